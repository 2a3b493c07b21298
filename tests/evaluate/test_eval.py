"""`stamo eval` on a real (tiny) run: numbers, files, reproducibility, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy import make_source

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.data.frames import Episodes
from stamo_dist.errors import CheckpointError, DataError, RunError
from stamo_dist.evaluate.interpolate import FADE, LINE, OWN, Interpolation
from stamo_dist.evaluate.reconstruct import MEAN, TOKENIZER, VAE, Reconstruction
from stamo_dist.evaluate.run_recipe import read_recipe
from stamo_dist.evaluate.weights import load_tokenizer
from stamo_dist.run.folder import open_run


def _psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return -10 * np.log10(((images - truth) ** 2).mean((-3, -2, -1)))


def _pixels(episodes: Episodes) -> np.ndarray:
    return np.concatenate([episodes.frames(e, range(12)) for e in range(len(episodes))]) / 255


def test_reconstruct_measures_the_held_out_frames(
    run: Path, toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # without AlexNet's weights
    result = Reconstruction(run, frames=1000).evaluate()
    rows = {(r["source"], r["image"]): r for r in result.rows}
    assert list(rows) == [(s, k) for s in ("a", "b", "all") for k in (MEAN, TOKENIZER, VAE)]
    by_hand = {}
    for name, frames in (("a", 60), ("b", 36)):
        train, held_out = (Episodes(str(toy.shards / name), split) for split in ("train", "val"))
        by_hand[name] = _psnr(_pixels(train).mean(0), _pixels(held_out))
        assert rows[name, MEAN]["psnr"] == pytest.approx(by_hand[name].mean(), abs=1e-3)
        assert rows[name, MEAN]["frames"] == frames
    assert rows["all", MEAN]["psnr"] == pytest.approx(np.concatenate([*by_hand.values()]).mean(), abs=1e-3)
    assert all(0 < r["psnr_moving"] < 40 and -1 <= r["ssim"] <= 1 for r in result.rows)

    folder = run / "eval" / "reconstruct"
    written = json.loads((folder / "reconstruct.json").read_text())
    assert written["rows"] == result.rows
    assert len(list(csv.DictReader((folder / "reconstruct.csv").open()))) == 9
    for figure in written["figures"]:
        assert Image.open(folder / figure["file"]).width > 4 * 144
    origin = written["provenance"]
    assert (origin["recipe"], origin["step"], origin["ema"], origin["seed"]) == ("toy", 4, True, 0)
    assert origin["data_fingerprint"]
    assert origin["checkpoint"].endswith("step_00000004")
    assert any(note.startswith("LPIPS: not measured") and "alexnet" in note for note in written["notes"])


def test_reconstruct_gives_the_same_numbers_again(run: Path, tmp_path: Path):
    first = Reconstruction(run, frames=8, out=tmp_path / "1").evaluate()
    again = Reconstruction(run, frames=8, out=tmp_path / "2").evaluate()
    other_batch = Reconstruction(run, frames=8, batch=3, out=tmp_path / "3").evaluate()
    other_step = Reconstruction(run, frames=8, checkpoint="2", out=tmp_path / "4").evaluate()
    assert first.rows == again.rows
    assert (tmp_path / "1" / "a.png").read_bytes() == (tmp_path / "2" / "a.png").read_bytes()
    for one, other in zip(first.rows, other_batch.rows, strict=True):
        assert one["psnr"] == pytest.approx(other["psnr"], abs=1e-3)
    assert other_step.provenance.step == 2
    assert other_step.rows[0] == first.rows[0], "the mean image does not depend on the weights"
    assert other_step.rows[1] != first.rows[1]


def test_newest_checkpoint_then_export(run: Path):
    folder = open_run(run)
    recipe = read_recipe(folder)
    tokenizer, _ = load_tokenizer(folder, recipe)
    averaged = read_weights(run / "checkpoints" / "step_00000004")
    for name, value in tokenizer.trained.state_dict().items():
        assert (value.cpu() == averaged[name]).all(), name
    (run / "checkpoints" / "step_00000004" / "checkpoint.json").unlink()  # as if killed while it was written
    assert load_tokenizer(folder, recipe)[1].step == 2
    shutil.rmtree(run / "checkpoints")
    tokenizer, provenance = load_tokenizer(folder, recipe)
    assert provenance.checkpoint.endswith("model")
    for name, value in tokenizer.trained.state_dict().items():
        assert (value.cpu() == averaged[name]).all(), name


def test_interpolate(run: Path, toy: SimpleNamespace):
    result = Interpolation(run, episodes=2, points=5, span=8).evaluate()
    rows = {(r["source"], r["image"]): r for r in result.rows}
    assert list(rows) == [(s, k) for s in ("a", "b") for k in (FADE, LINE, OWN)]
    held_out = Episodes(str(toy.shards / "a"), "val")
    share = np.array([0.25, 0.5, 0.75]).reshape(3, 1, 1, 1)
    expected = []
    for e in (1, 3):  # the middles of two halves of five episodes
        real = held_out.frames(e, [0, 2, 4, 6, 8]) / 255
        expected.append(_psnr((1 - share) * real[0] + share * real[-1], real[1:-1]).mean())
    assert rows["a", FADE]["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert -1 <= rows["a", LINE]["spearman"] <= 1
    assert rows["a", OWN]["spearman"] is None
    folder = run / "eval" / "interpolate"
    names = {figure.file for figure in result.figures}
    assert names == {f"{s}.{kind}" for s in ("a_1", "a_3", "b_0", "b_2") for kind in ("png", "gif")}
    with Image.open(folder / "a_1.gif") as gif:
        assert gif.n_frames == 8  # there and back

    Interpolation(run, episodes=1, points=5, span=100).evaluate()  # to each episode's end
    left = {path.name for path in folder.iterdir()}
    assert left == {"interpolate.csv", "interpolate.json", "a_2.png", "a_2.gif", "b_1.png", "b_1.gif"}, "stale pictures"


def test_what_cannot_be_measured_is_said_before_anything_runs(run: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"not a run folder.*run_dir"):
        Reconstruction(tmp_path).evaluate()
    with pytest.raises(CheckpointError, match=r"--checkpoint 3: .*step_00000004, step_00000002"):
        Reconstruction(run, checkpoint="3").evaluate()
    with pytest.raises(DataError, match=r"data.sources.a.*12 frames.*--start"):
        Interpolation(run, start=11).evaluate()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        Reconstruction(run).evaluate()
    resolved = run / "resolved.yaml"
    text = resolved.read_text()
    resolved.write_text(text.replace("stage: tokenizer", "stage: vae"))
    with pytest.raises(RunError, match="vae stage"):
        Reconstruction(run).evaluate()
    for name in ("a", "b"):
        make_source(tmp_path / "no_val", name, splits=("train",))
        text = text.replace(str(read_recipe_path(text, name)), str(tmp_path / "no_val" / name))
    resolved.write_text(text)
    with pytest.raises(DataError, match=r"(?s)data.sources.a: .*no 'val' split.*data.sources.b: .*no 'val' split"):
        Reconstruction(run).evaluate()
    assert not (run / "eval").exists()


def read_recipe_path(resolved: str, source: str) -> str:
    import yaml

    return yaml.safe_load(resolved)["data"]["sources"][source]["path"]
