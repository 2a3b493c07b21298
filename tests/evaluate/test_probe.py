"""`stamo eval probe`, and the heads it trains: on motions that say all, nothing, and on a real (tiny) run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stamo_dist.data.frames import Episodes
from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads
from stamo_dist.evaluate import probe as probing
from stamo_dist.evaluate.features import REPRESENTATIONS, STATE, motions
from stamo_dist.evaluate.workers import PartsFile


@pytest.mark.parametrize("kind", heads.KINDS)
def test_a_head_learns_what_is_there_and_nothing_else(kind: str):
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(1200, 6, generator=generator), torch.randn(6, 2, generator=generator) / 6**0.5
    episode = torch.arange(1200) // 60
    learned, told = slice(0, 1000), slice(1000, None)
    noise = torch.randn(1200, 2, generator=generator)
    for targets, low, high in ((inputs @ truth, 0, 0.08), (noise, 0.85, 1.2)):
        head = heads.fit(kind, 50 * inputs[learned] + 3, targets[learned], episode[learned], seed=1, epochs=200)
        assert low <= heads.error(head, 50 * inputs[told] + 3, targets[told]) < high
        again = heads.fit(kind, 50 * inputs[learned] + 3, targets[learned], episode[learned], seed=1, epochs=200)
        assert torch.equal(head(inputs), again(inputs)), "a seed is one head"


def test_probe_of_a_run(run: Path, toy: SimpleNamespace):
    options = {"k": (1, 3), "seeds": 2, "epochs": 2}
    result = probing.ActionProbe(run, **options).evaluate()
    rows = {(r["source"], r["head"], r["representation"]): r for r in result.rows}
    assert len(rows) == 2 * (1 + 2 * len(REPRESENTATIONS))
    assert result.partial is None
    for name in ("a", "b"):
        train, held_out = (Episodes(str(toy.shards / name), split) for split in ("train", "val"))
        learned = torch.cat([torch.as_tensor(train.actions(e)) for e in range(len(train))])
        told = torch.stack([torch.as_tensor(held_out.actions(e)) for e in range(len(held_out))])  # of 12 frames each
        told = (told - learned.mean(0)) / learned.std(0)
        by_hand = torch.stack([told[:, n : n + 3] for n in range(9)]).square().mean().item()
        assert rows[name, "–", probing.NOTHING]["mse_3"] == pytest.approx(by_hand, rel=1e-5)
    assert rows["a", heads.MLP, STATE]["dim"] == 2 * 32
    assert all(r["mse_1"] > 0 and r["mse_3"] > 0 for r in result.rows)
    folder = run / "eval" / "probe"
    assert {path.name for path in folder.iterdir()} == {"probe.csv", "probe.json", "a.png", "b.png"}
    assert len(list(csv.DictReader((folder / "probe.csv").open()))) == len(rows)

    kept = {path: path.stat().st_mtime_ns for path in (run / "eval" / "features").iterdir()}
    assert len(kept) == 2 * (5 + 3)
    assert probing.ActionProbe(run, **options).evaluate().rows == result.rows
    assert {path: path.stat().st_mtime_ns for path in (run / "eval" / "features").iterdir()} == kept, "kept features"
    probing.ActionProbe(run, checkpoint="2", out=run / "eval_at_2", **{**options, "k": (1,), "seeds": 1}).evaluate()
    assert len(list((run / "eval" / "features").iterdir())) == 2 * len(kept), "other weights, other features"


def test_a_killed_probe_says_partial_and_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"k": (1, 3), "seeds": 1, "epochs": 1}
    count, fit = 0, heads.fit

    def killed(*args: object, **more: object) -> heads.Head:
        nonlocal count
        count += 1
        if count == 14:  # the fourth head of the second k
            raise KeyboardInterrupt
        return fit(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(heads, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        probing.ActionProbe(run, **options).evaluate()
    left = json.loads((run / "eval" / "probe" / "probe.json").read_text())
    assert left["partial"] == "1 of 4 pairs of a source and a k are measured"
    assert left["rows"][0]["mse_3"] is None
    whole = probing.ActionProbe(run, **options).evaluate()
    assert count == 14 + 40 - 13, "what was measured is not measured again"
    assert whole.partial is None


def test_parts_of_other_settings_are_not_taken(tmp_path: Path):
    path = tmp_path / "parts.jsonl"
    assert PartsFile(path, {"seed": 0}).get("a", lambda: 1) == 1
    path.write_text(path.read_text() + '\n{"part": "b", "va')  # killed while it was written
    same = PartsFile(path, {"seed": 0})
    assert (same.get("a", lambda: 2), same.get("b", lambda: 2)) == (1, 2)
    assert PartsFile(path, {"seed": 0}).get("b", lambda: 3) == 2
    assert PartsFile(path, {"seed": 1}).get("a", lambda: 3) == 3


def test_what_cannot_be_probed_is_said_before_anything_runs(run: Path):
    with pytest.raises(DataError, match=r"(?s)data.sources.a: k = 12 needs 2 training .*13 frames.*12; choose .*--k"):
        probing.ActionProbe(run, k=(1, 12)).evaluate()
    assert not (run / "eval").exists()


def test_a_motion_is_the_difference_k_frames_on():
    rows = torch.arange(5.0)[:, None] ** 2
    assert motions(rows, 2).flatten().tolist() == [4, 8, 12]
