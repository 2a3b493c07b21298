"""A run begins with another's weights: under every strategy, per part, resized, and not read again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy import write_recipe
from toy_policy import write_diffusion_recipe, write_policy_recipe

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import read_checkpoint_manifest
from stamo_dist.errors import RecipeError
from stamo_dist.recipe.init_from import InitFrom
from stamo_dist.recipe.load import load
from stamo_dist.run.lineage import Parent, read, write
from stamo_dist.tasks.tokenizer import TokenizerTask
from stamo_dist.training.initial import _check_parts, find, open_initial

EMA = ["--set", "train.ema=0.9"]
#: Steps that leave the weights as they are.
STILL = ["--set", "optimizer.lr=1e-30", "--set", "train.steps=1"]


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def curve(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.fixture(scope="module")
def parent(toy, ranks, tmp_path_factory) -> Path:
    """The run folder of a toy tokenizer with an average, of 6 steps under zero2 on 2 processes."""
    recipe = write_recipe(tmp_path_factory.mktemp("parent") / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    ranks(2, "train", recipe, *EMA, "--set", "train.steps=6", "--set", "train.checkpoint.every=3")
    return recipe.parent / "run"


@pytest.fixture
def child(toy, tmp_path):
    def write(strategy: str = "ddp", name: str = "child") -> Path:
        return write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae, strategy=strategy)

    return write


def begin(ranks, recipe: Path, path: object, *more: str, processes: int = 1, check: bool = True):
    given = f"init_from={path}" if not isinstance(path, dict) else f"init_from={json.dumps(path)}"
    return ranks(processes, "train", recipe, "--set", given, *more, check=check)


SHAPES = [("ddp", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "fp32"),
          ("zero3", "bf16"), ("fsdp", "fp32"), ("fsdp", "bf16"), ("hsdp", "fp32")]  # fmt: skip


@pytest.mark.parametrize(("strategy", "precision"), SHAPES)
def test_every_strategy_begins_with_the_parent_s_average(parent, child, ranks, strategy, precision) -> None:
    """Also its master copies and its average, at whose values the first checkpoint shows them."""
    recipe = child(strategy)
    more = ["--set", f"train.precision={precision}", "--set", "train.ema=0.5", *STILL]
    output = begin(ranks, recipe, parent, *more, processes=2)[1]
    assert f"init_from: {newest(parent)} (averaged weights, " in output
    assert "decoder: loaded " in output
    assert "model.decoder: weights of init_from" in output
    expected = read_weights(newest(parent))
    for averaged in (False, True):
        found = read_weights(newest(recipe.parent / "run"), ema=averaged)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name].float(), weight.float(), rtol=1e-6, atol=1e-7, msg=name)
    manifest = read_checkpoint_manifest(newest(recipe.parent / "run"))
    assert manifest.sources["init_from"].startswith(f"{newest(parent)} (averaged weights, ")
    assert manifest.state.step == 1
    assert read(recipe.parent / "run") == Parent("init", str(parent), 6, "averaged")


def test_raw_weights_a_checkpoint_and_an_export(parent, child, ranks) -> None:
    """Each of them is what its source holds; an export is the average's."""
    raw, average = (read_weights(newest(parent), ema=ema) for ema in (False, True))
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    earlier = parent / "checkpoints/step_00000003"
    cases = {
        "raw": ({"path": str(parent), "weights": "raw"}, raw, Parent("init", str(parent), 6, "raw")),
        "earlier": (str(earlier), read_weights(earlier), Parent("init", str(parent), 3, "averaged")),
        "export": (str(parent / "model"), average, Parent("init", str(parent), 6)),
    }
    for name, (given, expected, recorded) in cases.items():
        recipe = child(strategy="fsdp", name=name)
        output = begin(ranks, recipe, given, *STILL, processes=2)[1]
        found = read_weights(newest(recipe.parent / "run"))
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-7, msg=f"{name} {key}")
        assert read(recipe.parent / "run") == recorded
        assert ("is not finished: step 3 of 6" in output) == (name == "earlier")


def test_parts_are_taken_alone(parent, child, ranks, tmp_path) -> None:
    recipe = child()
    given = {"path": str(parent), "parts": ["compressor"], "weights": "raw"}
    output = begin(ranks, recipe, given, *STILL)[1]
    plain = child(name="plain")
    ranks(1, "train", plain, *STILL)
    found, random, old = (read_weights(newest(run)) for run in (recipe.parent / "run", plain.parent / "run", parent))
    old = read_weights(newest(parent), ema=False)
    for name, weight in found.items():
        torch.testing.assert_close(weight, (old if name.startswith("compressor.") else random)[name], msg=name)
    count = sum(t.numel() for name, t in old.items() if name.startswith("compressor."))
    tensors = sum(name.startswith("compressor.") for name in old)
    assert f"compressor: loaded {tensors} tensors ({count:,} parameters)" in output
    assert "decoder: fresh " in output
    assert ", ignored " in output


def test_a_part_of_the_recipe_s_own_weights_gives_way(parent, child, ranks) -> None:
    recipe = child(strategy="fsdp")
    own = ["--set", f"model.decoder.weights={parent}/model/transformer"]
    output = begin(ranks, recipe, {"path": str(parent), "weights": "raw"}, *own, *STILL, processes=2)[1]
    assert f"decoder.weights: {parent}/model/transformer gives way to init_from" in output
    found, old = (read_weights(newest(run), ema=False) for run in (recipe.parent / "run", parent))
    assert all(torch.allclose(found[name], old[name], atol=1e-7) for name in old)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_positions_and_tokens_are_resized(parent, child, ranks, strategy) -> None:
    recipe = child(strategy)
    larger = ["--set", "model.encoder.image_size=48", "--set", "model.compressor.tokens=3"]
    code, output = begin(ranks, recipe, parent, *larger, *STILL, processes=2, check=False)
    assert code == 2
    assert "model.embeddings.position_embeddings: [1, 17, 32] in the parent, [1, 37, 32] in the recipe" in output
    assert "compressor.queries: [2, 32] in the parent, [3, 32] in the recipe" in output
    assert "(init_from.resize: [tokens] takes it)" in output
    both = {"path": str(parent), "weights": "raw", "resize": ["positions", "tokens"]}
    output = begin(ranks, recipe, both, *larger, *STILL, processes=2)[1]
    assert "encoder: loaded " in output
    assert ", resized 1 tensors" in output
    found, old = read_weights(newest(recipe.parent / "run")), read_weights(newest(parent), ema=False)
    assert torch.allclose(found["compressor.queries"][:2], old["compressor.queries"])
    apart = (found["compressor.queries"][2] - old["compressor.queries"][0]).norm() / old["compressor.queries"][0].norm()
    assert 0.02 < apart < 0.3, "a copy with a little noise"
    pooled = "decoder.transformer.time_text_embed.text_embedder.linear_1.weight"
    assert torch.allclose(found[pooled][:, :64], old[pooled])
    assert found[pooled][:, 64:].abs().max() < 1e-20
    table = "encoder.model.embeddings.position_embeddings"
    assert torch.allclose(found[table][:, 0], old[table][:, 0])
    grid = old[table][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.allclose(found[table][:, 1:].reshape(1, 6, 6, 32), grid.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_a_run_that_began_with_another_resumes_as_if_never_stopped(parent, child, ranks, strategy, tmp_path) -> None:
    """The parent may be gone by then; another `init_from` is said to have no effect."""
    moved = shutil.copytree(parent, tmp_path / "parent")
    settings = ["--set", "train.checkpoint.every=2", "--set", "optimizer.schedule=constant", *EMA]
    whole, broken = child(strategy, "whole"), child(strategy, "broken")
    begin(ranks, whole, moved, *settings, "--set", "train.steps=6", processes=2)
    begin(ranks, broken, moved, *settings, "--set", "train.steps=4", processes=2)
    shutil.rmtree(moved)
    other = str(tmp_path / "nowhere/else")
    output = begin(ranks, broken, other, *settings, "--set", "train.steps=6", processes=2)[1]
    assert f"init_from: {other} has no effect: this run began with {moved}/checkpoints/step_00000006" in output
    assert curve(broken.parent / "run") == curve(whole.parent / "run")
    models = [
        load_file(r.parent / "run/model/transformer/diffusion_pytorch_model.safetensors") for r in (whole, broken)
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    last = newest(broken.parent / "run")
    assert read_checkpoint_manifest(last).sources["init_from"].startswith(str(moved))
    shutil.rmtree(last)
    output = begin(ranks, broken, moved, *settings, "--set", "train.steps=6", processes=1)[1]
    assert "which is not read again" in output
    assert "model.encoder: weights of the checkpoint" in output
    assert "model.decoder: weights of the checkpoint" in output
    for one, other_ in zip(curve(broken.parent / "run"), curve(whole.parent / "run"), strict=True):
        assert one == pytest.approx(other_, rel=1e-4)


def _damage(run: Path) -> None:
    file = next((newest(run) / "state").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _truncate(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step_*"):
        (checkpoint / "checkpoint.json").unlink()


def _truncate_model(run: Path) -> None:
    file = run / "model/compressor/model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _flip_a_bit(run: Path) -> None:
    file = run / "model/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _remove_a_part(run: Path) -> None:
    shutil.rmtree(run / "model/transformer")


BAD = {
    "part": ("model", _remove_a_part, "model/transformer"),
    "missing": ("nowhere", None, "is not there: it was moved or removed"),
    "damaged": ("", _damage, "changed since it was written: state/"),
    "unfinished": ("", _truncate, "holds no whole checkpoint; its export is "),
    "no model": ("logs", None, "is no run, checkpoint or model that is known"),
    "export": ("model", _truncate_model, "is corrupt or incomplete"),
    "export's bit": ("model", _flip_a_bit, "changed since it was exported: transformer/diffusion_pytorch_model.safet"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_begun_with_is_refused_before_anything_is_written(
    parent, child, ranks, tmp_path, case, processes
) -> None:
    below, spoil, message = BAD[case]
    copy = shutil.copytree(parent, tmp_path / "parent")
    if spoil:
        spoil(copy)
    recipe = child()
    code, output = begin(ranks, recipe, copy / below, *STILL, processes=processes, check=False)
    assert code == 2, output
    line = next(line for line in output.splitlines() if "init_from: " in line)
    assert message in line
    assert not (recipe.parent / "run").exists()


def test_itself_a_circle_and_another_stage_are_refused(parent, child, ranks, tmp_path, toy) -> None:
    recipe = child()
    run = recipe.parent / "run"
    refused = {
        str(run): "is of this run itself",
        str(run / "checkpoints/step_00000001"): "is of this run itself",
        "s3://bucket/run": "copy it here first",
    }
    middle = shutil.copytree(parent, tmp_path / "middle")
    write(middle, Parent("init", str(run), 2))
    refused[str(middle)] = f"goes round in a circle ({run} → {middle} → {run})"
    for given, message in refused.items():
        code, output = begin(ranks, recipe, given, *STILL, check=False)
        assert (code, message in output) == (2, True), output
        assert not run.exists()
    vae = ["--set", "stage=vae", "--set", f"model.vae.weights={toy.vae}"]
    code, output = begin(ranks, recipe, parent, *vae, *STILL, check=False)
    assert code == 2
    assert "is of the tokenizer stage, and the recipe trains the vae stage" in output
    code, output = begin(ranks, recipe, {"path": str(parent), "parts": ["world_head"]}, *STILL, check=False)
    assert code == 2
    assert "init_from.parts: world_head: the tokenizer stage has encoder, compressor, decoder, straight" in output
    assert not run.exists()
    code, output = begin(ranks, recipe, {"path": str(parent), "resize": ["width"]}, *STILL, check=False)
    assert "must be a list (one of positions, tokens each)" in output
    code, output = begin(ranks, recipe, parent, "--set", "model.compressor.width=64", *STILL, check=False)
    assert code == 2
    assert "compressor.queries: [2, 32] in the parent, [2, 64] in the recipe\n" in output


@pytest.mark.parametrize(
    ("stage", "trained", "part", "said"),
    [
        (
            "tokenizer",
            "compressor.queries",
            "encoder",
            "compressor; it is frozen here: name it as model.encoder.weights",
        ),
        ("tokenizer", "compressor.queries", "vae", "compressor; it is frozen here: name it as model.vae.weights"),
        ("policy", "action_head.weight", "encoder", "action_head; it is frozen here: name it as policy.tokenizer"),
        ("vae", "model.decoder.conv_in.weight", "encoder", "vae"),
        ("tokenizer", "compressor.queries", "other", "compressor"),
    ],
)
def test_a_part_that_is_not_trained_is_named_where_the_stage_has_it(stage, trained, part, said) -> None:
    shapes = {trained: (1,)}
    with pytest.raises(RecipeError) as refused:
        _check_parts(InitFrom(path="p", parts=[part]), stage, SimpleNamespace(shapes=shapes), shapes, "p")
    assert refused.value.problems == [f"init_from.parts: {part}: the recipe trains {said}"]


def test_a_policy_begins_with_another_s_export_and_checkpoint(toy_policy, ranks, tmp_path) -> None:
    """OpenVLA at toy size, its world head fresh; the diffusion transformer."""
    none = ["--set", "policy.world=null", "--set", "train.steps=3", *EMA]
    for kind, write_one in (("openvla", write_policy_recipe), ("diffusion", write_diffusion_recipe)):
        first = write_one(tmp_path / kind / "first/toy.yaml", toy_policy)
        ranks(1, "train", first, *(none if kind == "openvla" else none[2:]))
        run = first.parent / "run"
        expected = read_weights(newest(run))
        for name, given in {"export": run / "model", "checkpoint": run}.items():
            recipe = write_one(tmp_path / kind / name / "toy.yaml", toy_policy, strategy="zero2")
            output = begin(ranks, recipe, given, *STILL, processes=2)[1]
            found = read_weights(newest(recipe.parent / "run"))
            for key, weight in expected.items():
                torch.testing.assert_close(found[key].float(), weight.float(), rtol=1e-6, atol=1e-6, msg=key)
            assert ("world_head: fresh " in output) == (kind == "openvla")
            assert f"{'language' if kind == 'openvla' else 'policy'}: loaded " in output
            assert ", ignored " not in output
            assert ("policy: weights of init_from" in output) == (kind == "diffusion")


def test_a_vae_begins_with_another(toy, ranks, tmp_path) -> None:
    recipes = [write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae) for name in ("first", "second", "third")]
    stage = ["--set", "stage=vae"]
    ranks(1, "train", recipes[0], *stage, "--set", "train.steps=2", *EMA)
    run = recipes[0].parent / "run"
    for recipe, given in zip(recipes[1:], (run, run / "model"), strict=True):
        begin(ranks, recipe, given, *stage, *STILL, "--set", f"model.vae.weights={toy.vae}")
        found, expected = (read_weights(newest(at)) for at in (recipe.parent / "run", run))
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_hub_id_is_pinned_to_the_commit_that_was_read(parent, child, ranks, tmp_path, monkeypatch) -> None:
    commit, repo = "a" * 40, tmp_path / "hub/models--lab--tokenizer"
    shutil.copytree(parent / "model", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "stamo_dist.cli", "train", str(child())]
    run = tmp_path / "child/run"
    more = ["--set", "init_from=lab/tokenizer", "--set", "train.checkpoint.every=2", "--set", "optimizer.lr=1e-30"]
    for steps in (2, 3):
        subprocess.run([*command, *more, "--set", f"train.steps={steps}"], check=True, timeout=300)
        assert read_checkpoint_manifest(newest(run)).sources["init_from"] == f"lab/tokenizer@{commit}"
        assert f"path: lab/tokenizer@{commit}" in (run / "resolved.yaml").read_text()
        (repo / "refs/main").write_text("b" * 40)  # a branch that moved, to what is not at hand
    assert read(run) == Parent("init", f"lab/tokenizer@{commit}")
    found, expected = read_weights(newest(run)), read_weights(newest(parent))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_what_is_given_whole_is_built_without_memory(parent, child) -> None:
    """A random decoder would be as large as the model, on every process."""
    given = [f"init_from={parent}", "train.precision=fp32"]
    for more, empty in (([], True), ([f"init_from={json.dumps({'path': str(parent), 'parts': ['encoder']})}"], False)):
        recipe = load(child(), [*given, *more]).recipe
        initial = open_initial(recipe, find(recipe, Path(recipe.run_dir), print))
        assert initial is not None
        task = TokenizerTask(recipe, meta_init=True, unfilled=initial.may_give_all)
        assert initial.meet(task.trained)
        decoder = [p for name, p in task.trained.named_parameters() if name.startswith("decoder.")]
        assert [p.is_meta for p in decoder] == [empty] * len(decoder)
        assert initial.gives_all(task.trained) == empty


def test_a_deeper_model_has_fresh_layers(parent, child, ranks) -> None:
    recipe = child(strategy="fsdp")
    output = begin(ranks, recipe, parent, "--set", "model.compressor.depth=2", *STILL, processes=2)[1]
    assert "compressor: loaded 23 tensors (15,072 parameters), fresh 14 tensors" in output


def test_states_that_would_not_be_standardised_are_refused(parent, child, ranks) -> None:
    recipe, alone = child(), {"path": str(parent), "parts": ["encoder"]}
    code, output = begin(ranks, recipe, alone, "--set", "model.compressor.standardise=64", *STILL, check=False)
    assert code == 2
    assert "init_from.parts: an encoder without its compressor is not standardised" in output
    white = ["--set", "model.compressor.standardise=64", "--set", "model.compressor.whiten=true"]
    code, output = begin(ranks, recipe, parent, *white, *STILL, check=False)
    assert code == 2
    assert f"model.compressor.whiten: {parent} does not whiten its states" in output


def test_a_run_whose_own_checkpoints_are_all_damaged_begins_anew_with_its_parent(parent, child, ranks) -> None:
    recipe = child()
    begin(ranks, recipe, parent, *STILL)
    run = recipe.parent / "run"
    _damage(run)
    code, output = begin(ranks, recipe, parent, *STILL, check=False)
    assert code == 75, output
    assert "to be started again, from init_from" in output
    assert "encoder: loaded" in begin(ranks, recipe, parent, *STILL)[1]
    assert read(run) == Parent("init", str(parent), 6, "averaged")
