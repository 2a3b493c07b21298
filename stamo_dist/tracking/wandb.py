"""Weights & Biases, if the recipe enables `tracking.wandb`."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.success import KEY

_NO_NUMBERS = ("step", "changed", "alarms")


class WandB:
    """A W&B run that keeps its id over restarts; does nothing when tracking is off."""

    def __init__(self, recipe: Recipe, folder: Path, resolved: dict[str, Any]):
        self._run: Any = None
        self._late: list[dict[str, Any]] = []
        self._free: int | None = None  # W&B's step for the next of them after the last training step
        if recipe.tracking.wandb == "off":
            return
        self._temporary = folder / "wandb" / "tmp"
        wandb = _imported(self._temporary)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            mode=recipe.tracking.wandb,
            project=recipe.tracking.project,
            entity=recipe.tracking.entity,
            tags=recipe.tracking.tags,
            name=recipe.name,
            dir=str(folder),
        )
        self._run.config.update(resolved, allow_val_change=True)
        self._run.define_metric(f"{KEY}/*", step_metric=f"{KEY}/step")

    def log(self, line: dict[str, Any]) -> None:
        if self._run is not None:
            late = self._late.pop(0) if self._late else {}
            self._free = line["step"] + bool(late)
            numbers = {k: v for k, v in line.items() if k not in _NO_NUMBERS}
            numbers |= {f"alarm/{name}": z for name, z in line.get("alarms", {}).items()}
            self._run.log({**numbers, **late}, step=line["step"])

    def late(self, line: Mapping[str, Any]) -> None:
        """Log a measurement of an earlier step, on its own axis.

        It is logged with the next step: W&B's steps only ascend, and a separate row would take the next step's number.
        """
        if self._run is not None:
            self._late.append({f"{KEY}/step": line["step"], **{k: v for k, v in line.items() if k != "step"}})

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        if self._run is not None:
            for i, late in enumerate(self._late):
                self._run.log(late, step=None if self._free is None else self._free + i)
            self._run.finish()
            shutil.rmtree(self._temporary, ignore_errors=True)


def _imported(temporary: Path) -> Any:
    """W&B, whose folders for pictures on their way are in `temporary`.

    It makes them as it is imported, in the system's, and leaves them there if the process is killed; what an earlier
    start left here is removed.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        import wandb
    finally:
        tempfile.tempdir = before
    return wandb
