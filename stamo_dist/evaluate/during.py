"""Small measurements of a tokenizer during training: one row per step and source, for the report and W&B."""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.errors import StamoError
from stamo_dist.evaluate import curve, heads
from stamo_dist.evaluate.features import STATE
from stamo_dist.evaluate.measurement import Measurement
from stamo_dist.evaluate.probe import ActionProbe
from stamo_dist.evaluate.reconstruct import TOKENIZER, Reconstruction
from stamo_dist.evaluate.result import EvaluationResult, Figure, Provenance
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.training.evaluation import Evaluation

_HEADINGS = {"step": "step", "source": "source", "psnr": "PSNR dB", "ssim": "SSIM", "psnr_moving": "moving dB"}
_ABOUT = (
    "Measured on saved weights while it trained, on a few held-out frames and episodes (`evaluate` in the recipe): "
    "reconstruction, and the squared error of the MLP head that reads actions from motions, one seed."
)
_EPISODES, _EPOCHS = 16, 20  # of the probe


class _QuickProbe(ActionProbe):
    kinds = (heads.MLP,)
    representations = (STATE,)
    keep_features = False


class BlockingEvaluation(Evaluation):
    """Measures a tokenizer on rank 0 while the others wait."""

    def __init__(self, run: Path, recipe: Recipe):
        self._run, self._recipe = run, recipe

    def begin(self, step: int, logger: RunLogger) -> None:
        self._logger = logger
        if folder_of(RunFolder(self._run).checkpoints, step).exists():
            self.saved(step)  # the start may have been stopped before, and its metrics line removed on resumption

    def saved(self, step: int) -> bool:
        every, say = self._recipe.evaluate.every, self._logger.info
        if not (every and step and step % every == 0):
            return False
        began = time.perf_counter()
        try:
            with torch.random.fork_rng():  # the training state must not change
                numbers, pictures = measure(self._run, self._recipe, step)
        except StamoError as e:
            say(f"step {step} could not be evaluated: {e}")
            return True
        self._logger.log_eval(step, numbers, pictures)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        say(f"step {step} evaluated in {time.perf_counter() - began:.1f} s: {shown}")
        return True


def measure(run: Path, recipe: Recipe, step: int) -> tuple[dict[str, float], dict[str, Path]]:
    """Measure the checkpoint of `step`; returns numbers and pictures by name, for the metrics and W&B.

    Raises:
        StamoError: A source has no held-out split, or one too short for the probe.
    """
    here = curve.folder(RunFolder(run), step)
    checkpoint = str(folder_of(RunFolder(run).checkpoints, step))
    rows: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Path] = {}
    provenance = None
    if recipe.evaluate.reconstruct:
        frames = recipe.evaluate.reconstruct
        result = _quietly(Reconstruction(run, checkpoint, here, frames=frames))
        provenance = result.provenance
        for row in result.rows:
            if row["image"] == TOKENIZER and row["source"] != "all":
                rows[row["source"]] = {key: row[key] for key in ("psnr", "ssim", "psnr_moving")}
        sources = [row["source"] for row in result.rows[::3] if row["source"] != "all"]
        pictures = {f"eval/{s}": here / f.file for s, f in zip(sources, result.figures, strict=True)}
    if recipe.evaluate.probe:
        ks, more = list(recipe.evaluate.probe), {"episodes": _EPISODES, "epochs": _EPOCHS}
        result = _quietly(_QuickProbe(run, checkpoint, here / "probe", k=ks, seeds=1, **more))
        provenance = provenance or result.provenance
        for row in result.rows:
            if row["representation"] == STATE:
                found = {f"mse_{k}": row[f"mse_{k}"] for k in recipe.evaluate.probe}
                rows.setdefault(row["source"], {}).update(found)
    if provenance is None:
        return {}, {}
    table = [{"step": step, "source": source, **row} for source, row in rows.items()]
    (here / "row.json").write_text(json.dumps({"rows": table, "provenance": asdict(provenance)}))
    _summary(here.parent, recipe, pictures, step, provenance)
    numbers = {f"eval/{row['source']}/{key}": row[key] for row in table for key in row if key not in ("step", "source")}
    return {key: value for key, value in numbers.items() if value is not None}, pictures


def _quietly(measurement: Measurement) -> EvaluationResult:
    result = measurement.evaluate(Console(file=io.StringIO()))
    assert result is not None, "it is measured by this process alone"
    return result


def _summary(folder: Path, recipe: Recipe, pictures: dict[str, Path], step: int, provenance: Provenance) -> None:
    """One table of all steps up to this one; later ones belong to a start that was rolled back."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("step_*/row.json"))]
    rows = [row for part in parts for row in part["rows"] if row["step"] <= step]
    columns = dict(_HEADINGS) if recipe.evaluate.reconstruct else {"step": "step", "source": "source"}
    columns |= {f"mse_{k}": f"k = {k}" for k in recipe.evaluate.probe}
    figures = [Figure(str(p.relative_to(folder)), f"{name[5:]}, step {step}") for name, p in pictures.items()]
    rows = [{key: row.get(key) for key in columns} for row in rows]
    settings = recipe.evaluate.model_dump()
    EvaluationResult(
        curve.NAME, "While it trained", _ABOUT, columns, rows, settings, provenance, figures=figures
    ).write(folder)
