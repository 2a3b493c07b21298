"""Reading recipes: merging, overrides, provenance, and every problem at once with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.load import Loaded, dump, load

GOOD = """\
data:
  sources:
    a: {path: shards/a}
train:
  steps: 10
  global_batch: 12
model: {encoder: {train: true}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the working directory; the first one is the recipe."""
    monkeypatch.chdir(tmp_path)

    def _write(**texts: str) -> Path:
        for name, text in texts.items():
            path = Path(name.replace("__", "/") + ".yaml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return Path(next(iter(texts)) + ".yaml")

    return _write


def problems(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides, world_size)
    return caught.value.problems


def test_every_problem_is_listed_at_once_with_its_line(write):
    path = write(
        run="""\
extends: base.yaml
data:
  sources:
    a: {path: x, weight: -1}
    a: {path: y}
  latents: cached
  augment: {crop: 0.5}
  image_sise: 64
model:
  encoder: {image_size: big}
  compressor: {heads: 3, width: 100}
train:
  steps: true
  lr: 1e-3
optimizer: {betas: [0.9, 2], clip: .inf}
seed: ${oc.env:HOME}
flow:
""",
        base="strategy: {name: zerro2}\ntrain: {global_batch: 10}\n",
    )
    found = problems(path, "train.micro_batch=0", "nonsense", "tracking.tags=x", world_size=3)
    expected = [
        "base.yaml:1: strategy.name: must be one of ddp, zero1, zero2, zero3, fsdp, hsdp, not zerro2; "
        "did you mean zero2?",
        "base.yaml:2: train.global_batch: 10 is not divisible by 3 processes; it runs on 1, 2, 5, 10",
        "run.yaml:4: data.sources.a.weight: must be a number at least 0 or natural or a map, not -1",
        "run.yaml:5: data.sources.a: given twice, first on line 4; keep one of them",
        "run.yaml:6: data.latents: cached latents cannot be augmented; set data.augment off or latents: online",
        "run.yaml:8: data.image_sise: no such field; did you mean image_size?",
        "run.yaml:10: model.encoder.image_size: must be a whole number above 0, not big",
        "run.yaml:10: model.encoder: an encoder without weights must be trained: "
        "set model.encoder.weights or train: true",
        "run.yaml:11: model.compressor.heads: 3 must divide width 100",
        "run.yaml:13: train.steps: must be a whole number above 0, not true",
        "run.yaml:14: train.lr: no such field; did you mean optimizer.lr?",
        "run.yaml:15: optimizer.betas: must be a list of 2 (a number at least 0 and at most 1 each), not [0.9, 2]",
        "run.yaml:15: optimizer.clip: must be a number above 0 or null, not .inf",
        "run.yaml:16: seed: ${oc.env:HOME}: recipes have no interpolation; write the value itself",
        "run.yaml:17: flow: empty; give it fields or remove the line",
        "--set nonsense: write FIELD=VALUE, for example --set train.steps=1000",
        "--set train.micro_batch: must be a whole number above 0, not 0",
        "--set tracking.tags: must be a list (text each), not x; did you mean [x]?",
    ]
    assert sorted(found) == sorted(expected)
    assert found[:14] == expected[:14]  # in the order of the files, so that they can be worked through


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml:1: train: missing (a map with steps): The schedule of one run."),
        ("data: {}\n" + GOOD.partition("train")[1] + ": {}", "run.yaml:1: data.sources: missing"),
        (GOOD.replace("  steps: 10\n", ""), "run.yaml:4: train.steps: missing (a whole number above 0)"),
        ("- 1", "run.yaml:1: a recipe is a map of fields"),
        (GOOD + "seed: [1", "run.yaml:8:9: not readable as YAML"),
        (GOOD + "seed: &x 1", "run.yaml:8:7: not readable as YAML: anchors and aliases are not read"),
        (GOOD + "seed: {<<: 1}", "run.yaml:8: seed: merge keys (<<) are not read; use extends"),
        (GOOD + "seed: !!python/object:os.system x", "run.yaml:8: seed: the tag"),
        (GOOD + 'seed: "\x01"', "run.yaml:8: not readable as YAML"),
        (GOOD + "1: 2", "run.yaml:8: the name 1 is not text"),
        ("[" * 3000, "run.yaml:1: not readable as YAML: nested too deeply"),
        (GOOD.replace("a: {", "a b: {"), "run.yaml:2: data.sources: a source's name has letters"),
        (GOOD.replace("shards/a", "x, weight: 0"), "run.yaml:2: data.sources: the weights sum to nothing"),
        (
            GOOD + "strategy: {name: hsdp, shard_group: 1}",
            "run.yaml:8: strategy.shard_group: a group of 1 shards nothing; set it to 2",
        ),
        (
            GOOD + "strategy: {name: zero2, gradients: whole}",
            "run.yaml:8: strategy.gradients: is of fsdp and hsdp; zero2 would ignore",
        ),
        (GOOD.replace("shards/a", "x, cameras: top"), "run.yaml:3: data.sources.a.cameras: must be a list (text each)"),
        (
            GOOD.replace("shards/a", "x, cameras: [top, side, top]"),
            "run.yaml:3: data.sources.a.cameras: top: given twice",
        ),
        (GOOD + "init_from: 5", "run.yaml:8: init_from: must be text or a map or null, not 5"),
        (GOOD + "optimizer: {betas: [true, 0.9]}", "run.yaml:8: optimizer.betas: must be a list of 2"),
        (GOOD + "extends: {a: b}", "run.yaml:8: extends: must be a file name or a list of file names"),
        (GOOD + "extends: ruin.yaml", "run.yaml:8: extends: ruin.yaml: no such file (names are relative to ./)"),
        (GOOD + "extends: run.yaml", "run.yaml:8: extends: goes round in a circle: run.yaml → run.yaml"),
    ],
)
def test_unusable_text_is_refused_with_its_place(write, text, message):
    found = problems(write(run=text))
    assert any(p.startswith(message) for p in found), found


def test_missing_recipe_suggests_its_neighbour(write):
    write(run=GOOD)
    assert problems(Path("rum.yaml")) == ["rum.yaml: no such file; did you mean run.yaml?"]


def test_a_broken_base_does_not_raise_follow_up_problems(write):
    path = write(run="extends: [gone.yaml, sub/loop.yaml]\nseed: x\n", sub__loop="extends: ../run.yaml\n")
    assert problems(path) == [
        "run.yaml:1: extends: gone.yaml: no such file (names are relative to ./)",
        "run.yaml:2: seed: must be a whole number at least 0, not x",
        "sub/loop.yaml:1: extends: goes round in a circle: run.yaml → sub/loop.yaml → run.yaml",
    ]


@pytest.fixture
def mixed(write) -> Loaded:
    path = write(
        run="""\
extends: [bases/one.yaml, bases/two.yaml]
data:
  sources:
    a: null
    b: {weight: 5}
optimizer:
  betas: [0.1, 0.2]
""",
        bases__one=GOOD + "optimizer: {betas: [0.5, 0.6], lr: 1e-4}\n",
        bases__two="extends: three.yaml\ntrain: {steps: 20}\n",
        bases__three="data: {sources: {b: {path: shards/b, cameras: [x, y]}}}\ntrain: {steps: 30, log_every: 7}\n",
    )
    return load(path, ["train.log_every=9", "tracking={wandb: off, tags: [t]}", "data.sources.b.split=val"])


def test_maps_merge_lists_replace_later_wins(mixed):
    r = mixed.recipe
    assert set(r.data.sources) == {"b"}  # null took `a` out
    b = r.data.sources["b"]
    assert (b.path, b.weight, b.split, b.cameras) == ("shards/b", 5, "val", ["x", "y"])
    assert (r.optimizer.betas, r.optimizer.lr) == ((0.1, 0.2), 1e-4)
    assert (r.train.steps, r.train.log_every, r.train.global_batch) == (20, 9, 12)
    assert (r.tracking.wandb, r.tracking.tags) == ("off", ["t"])
    assert (r.name, r.run_dir) == ("run", "runs/run")


def test_provenance_names_the_line_of_every_value(mixed):
    origin = mixed.provenance
    assert origin["train.steps"] == "bases/two.yaml:2"
    assert origin["train.global_batch"] == "bases/one.yaml:6"
    assert origin["data.sources.b.path"] == "bases/three.yaml:1"
    assert origin["data.sources.b.weight"] == "run.yaml:5"
    assert origin["optimizer.betas"] == "run.yaml:7"
    assert origin["train.log_every"] == origin["tracking.tags"] == origin["data.sources.b.split"] == "--set"
    assert origin["name"] == origin["run_dir"] == origin["flow.shift"] == "default"
    assert not any(field.startswith("data.sources.a") for field in origin)
    assert mixed.text == Path("run.yaml").read_text()


def test_dump_is_a_recipe_by_itself(mixed):
    Path("elsewhere.yaml").write_text(dump(mixed.recipe))
    again = load("elsewhere.yaml")
    assert again.recipe == mixed.recipe
    assert again.resolved == mixed.resolved


def test_a_list_and_a_map_in_one_place_is_a_problem_of_the_later(write):
    path = write(run="extends: base.yaml\noptimizer: {betas: {x: 1}}\n", base=GOOD + "optimizer: {betas: [0.1, 0.2]}\n")
    assert problems(path)[0].startswith("run.yaml:2: optimizer.betas: must be a list of 2")


def test_overrides_of_sources(write):
    path = write(run=GOOD)
    assert set(load(path, ["data.sources.b={path: p}", "data.sources.a=null"]).recipe.data.sources) == {"b"}
    (typo,) = problems(path, "data.sources.aa.weight=2")
    assert typo.startswith("--set data.sources.aa.weight: data.sources.aa.path: missing")
    assert typo.endswith("(did you mean a?)")
    (gone,) = problems(path, "data.sources.aa=null")
    assert gone == ("--set data.sources.aa: null removes an inherited source, but none has this name; did you mean a?")


def test_world_size_must_be_positive(write):
    assert problems(write(run=GOOD), world_size=0) == ["world size 0: must be at least 1 process"]


def test_an_empty_map_that_would_remove_nothing_is_refused(write):
    path = write(run=GOOD + "optimizer: {lr: 1e-4}\nflow: {}\n", child="extends: run.yaml\noptimizer: {}\n")
    stays = "an empty map removes nothing, as maps are merged: "
    assert problems(path, "data.sources={}", "model={encoder: {}}") == [
        f"--set data.sources: {stays}a stay; data.sources.NAME: null removes one",
        f"--set model: model.encoder: {stays}train stay; name what is to change",
    ]
    assert problems(Path("child.yaml")) == [f"child.yaml:2: optimizer: {stays}lr stay; name what is to change"]
    assert load(path, ["flow={}", "tracking={}"])


def test_a_short_form_is_merged_as_the_map_it_stands_for(write):
    path = write(run=GOOD + "init_from: runs/a\n")
    assert load(path).provenance["init_from.path"] == "run.yaml:8"
    loaded = load(path, ["init_from.parts=[encoder]"])
    assert loaded.resolved["init_from"] == {"path": "runs/a", "parts": ["encoder"], "weights": None, "resize": []}
    assert (loaded.origin("init_from.path"), loaded.origin("init_from.parts")) == (
        "run.yaml:8", "--set init_from.parts",
    )  # fmt: skip
    loaded = load(path, ["init_from.parts=[encoder]", "init_from=runs/b"])
    assert (loaded.recipe.init_from.path, loaded.recipe.init_from.parts) == ("runs/b", ["encoder"])
    assert loaded.origin("init_from.path") == "--set init_from"
    assert load(path, ["init_from=null"]).recipe.init_from is None
