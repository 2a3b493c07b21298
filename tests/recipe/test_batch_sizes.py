"""`train.global_batch` that changes at given steps: its arithmetic, how it is written, and what is refused."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.batching import batchings
from stamo_dist.recipe.difference import differences
from stamo_dist.recipe.load import Loaded, dump, load
from stamo_dist.recipe.render import render
from stamo_dist.recipe.unread import unread

RECIPE = """\
data: {{sources: {{a: {{path: a, weight: {weight}}}, b: {{path: b}}}}}}
train: {{steps: 20, global_batch: {batch}, micro_batch: 2}}
"""


def recipe(path: Path, *overrides: str, batch: str = "{0: 8, 1_0: 12}", weight: str = "1") -> Loaded:
    path.write_text(RECIPE.format(batch=batch, weight=weight))
    return load(path, overrides)


@pytest.mark.parametrize("value", [8, {0: 8}, {0: 8, 5: 12, 9: 4}, {"0": 3, "1": 5, "2": 5, "7": 3}])
def test_positions(value):
    sizes = BatchSizes.of(value)
    steps = {int(at): size for at, size in value.items()} if isinstance(value, dict) else {0: value}
    each = [steps[max(at for at in steps if at <= batch)] for batch in range(30)]
    assert [sizes.at(batch) for batch in range(30)] == each
    before = [0, *accumulate(each)]
    assert [sizes.before(batch) for batch in range(31)] == before
    for samples in range(before[-1]):
        assert sizes.batches(samples) == max(n for n, there in enumerate(before) if there <= samples)
    for batch in range(30):
        same = sizes.left(batch, 10)
        assert set(each[batch : batch + same]) == {each[batch]}
        assert same == 10 or each[batch + same] != each[batch]
    assert BatchSizes.of(sizes.plain) == sizes


def test_one_size_is_a_number():
    assert BatchSizes.of({0: 8, 5: 8}).plain == 8
    assert str(BatchSizes.of({0: 8, 5: 8})) == "8"
    assert str(BatchSizes.of({0: 8, 5: 12})) == "8, 12 after step 5"


def test_each_size_is_spread_over_the_processes(tmp_path):
    loaded = recipe(tmp_path / "r.yaml")
    assert list(map(str, batchings(loaded.recipe.train, 2))) == ["8 = 2 × 2 × 2", "12 = 2 × 3 × 2"]
    assert loaded.recipe.train.samples == 10 * 8 + 10 * 12
    with pytest.raises(
        ValueError, match=r"train\.global_batch: 12 \(after step 10\) is not divisible by 8 .* 1, 2, 4$"
    ):
        batchings(loaded.recipe.train, 8)


def test_steps_are_written_and_printed_as_numbers(tmp_path):
    """In a file and with --set; what `recipe show` prints and a run keeps is read back."""
    loaded = recipe(tmp_path / "r.yaml", "data.sources.a.weight={0: 2, 15: 1}")
    assert loaded.recipe.train.global_batch == {0: 8, 10: 12}
    assert loaded.recipe.data.sources["a"].weight == {0: 2, 15: 1}
    shown = "\n".join(line.plain for line in render(loaded))
    assert "  global_batch: {0: 8, 10: 12}" in shown
    assert f"# {tmp_path}/r.yaml:2" in shown
    for text in (shown, dump(loaded.recipe)):
        (tmp_path / "again.yaml").write_text(text)
        again = load(tmp_path / "again.yaml").recipe
        assert (again.train, again.data) == (loaded.recipe.train, loaded.recipe.data)


def test_a_map_from_steps_replaces_the_inherited_one(tmp_path):
    recipe(tmp_path / "base.yaml", weight="{0: 2, 5: 1}")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\ntrain: {global_batch: {0: 4, 3: 8}}\n")
    loaded = load(tmp_path / "r.yaml", ["data.sources.a.weight={0: 3}"])
    assert loaded.recipe.train.global_batch == {0: 4, 3: 8}
    assert loaded.recipe.data.sources["a"].weight == {0: 3}
    one = load(tmp_path / "r.yaml", ["train.global_batch.3=16"])
    assert one.recipe.train.global_batch == {0: 4, 3: 16}
    assert one.provenance["train.global_batch"] == "--set"
    assert load(tmp_path / "r.yaml", ["train.global_batch=32"]).recipe.train.global_batch == 32


def test_a_change_is_one_difference(tmp_path):
    old, new = (recipe(tmp_path / "r.yaml", batch=batch).resolved for batch in ("8", "{0: 8, 10: 12}"))
    assert list(map(str, differences(old, new))) == ["train.global_batch: 8 → {0: 8, 10: 12}"]


def test_steps_after_the_last_have_no_effect(tmp_path):
    assert unread(recipe(tmp_path / "r.yaml")) == []
    notes = unread(recipe(tmp_path / "r.yaml", "train.steps=10", weight="{0: 1, 30: 2}"))
    assert notes == [
        f"no effect: train.global_batch ({tmp_path}/r.yaml:2) after step 10: the run ends at step 10",
        f"no effect: data.sources.a.weight ({tmp_path}/r.yaml:1) after step 30: the run ends at step 10",
    ]


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ("{1: 8}", "steps must increase from 0, as in {0: 256, 20_000: 1024}, unlike 1"),
        ("{0: 8, 12: 4, 10: 2}", "steps must increase from 0, as in {0: 256, 20_000: 1024}, unlike 0, 12, 10"),
        ("{0: 8, 12: 0}", ".12: must be a whole number above 0, not 0"),
        ("{0: 8, 12: {a: 4}}", ".12: must be a whole number above 0, not a map"),
        ("{0: 8, -3: 4}", ".-3: the name must be a whole number at least 0"),
        ("{0: 8, x: 4}", ".x: the name must be a whole number at least 0"),
        ("{0: 8, 9:4}", ".9:4: the name must be a whole number at least 0; write a space after the colon"),
        ("{0: 8, 12.5: 4}", ": the name 12.5 is not text; write a whole number"),
        ("{0: true}", "must be a whole number above 0 or a map"),
        ("8.5", "must be a whole number above 0 or a map"),
        ("{0: 8, 0: 12}", "given twice, first on line 2"),
    ],
)
def test_what_is_refused(tmp_path, batch, why):
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path / "r.yaml", batch=batch)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/r.yaml:2: train.global_batch")
    assert why in problem


def test_every_wrong_entry_is_named_at_its_line(tmp_path):
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path / "r.yaml", batch="{0: 8,\n 10: -3,\n x: 5,\n 20: foo}")
    at = f"{tmp_path}/r.yaml"
    assert caught.value.problems == [
        f"{at}:3: train.global_batch.10: must be a whole number above 0, not -3",
        f"{at}:4: train.global_batch.x: the name must be a whole number at least 0",
        f"{at}:5: train.global_batch.20: must be a whole number above 0, not foo",
    ]


@pytest.mark.parametrize("batch", ["8", "{0: 8, 10: 12}"])
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("={5: 8, 3: 9}", "steps must increase from 0"),
        (".5=8", "train.global_batch: steps must increase from 0"),
        (".x=8", "the name must be a whole number at least 0"),
        ("={0: 8, 9: 2.5}", "train.global_batch.9: must be a whole number above 0, not 2.5"),
    ],
)
def test_a_map_of_the_command_line_is_its_problem(tmp_path, batch, given, why):
    if given == ".5=8" and batch != "8":
        given, why = ".10=0", "must be a whole number above 0, not 0"
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path / "r.yaml", f"train.global_batch{given}", batch=batch)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--set train.global_batch{given.partition('=')[0]}: {why}")


def test_virtual_workers_divide_every_size(tmp_path):
    with pytest.raises(RecipeError, match=r"8 is not a power of two that divides train.global_batch \(8, 12 after"):
        recipe(tmp_path / "r.yaml", "train.virtual_workers=8", "strategy.name=ddp")
