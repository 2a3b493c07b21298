"""The result of a measurement: a table, notes, figures, and their provenance."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.table import Table

from stamo_dist.checkpoint.manifest import CheckpointManifest
from stamo_dist.errors import RunError
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.code import code_version
from stamo_dist.run.folder import RunFolder, write_atomic
from stamo_dist.tables import Whole, show


@dataclass(frozen=True)
class Provenance:
    """The provenance of a result."""

    recipe: str
    data_fingerprint: str | None  # fingerprint of the training mixture; null for an export without its checkpoints
    checkpoint: str
    step: int
    ema: bool  # whether the weights are the moving average
    trained_commit: str | None
    git_commit: str | None  # commit of the measuring code, or its version and hash
    seed: int  # of the run
    command: str
    date: str

    @classmethod
    def of_export(cls, recipe: Recipe, weights: str, step: int) -> Provenance:
        """Provenance of weights that a run exported at `step`; 0: they were not trained."""
        return cls._now(recipe.name, weights, step, ema=bool(step) and recipe.train.ema is not None, seed=recipe.seed)

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, path: Path, marker: CheckpointManifest) -> Provenance:
        """Of a checkpoint with its manifest."""
        found = cls._now(recipe.name, str(path), marker.state.step, ema=marker.averaged, seed=recipe.seed)
        return replace(found, data_fingerprint=marker.fingerprint, trained_commit=marker.git_commit)

    @classmethod
    def of_released(cls, weights: str) -> Provenance:
        """Provenance of weights that were not trained in a run folder."""
        return cls._now(Path(weights).name, weights, 0, ema=False, seed=0)

    @classmethod
    def _now(cls, recipe: str, checkpoint: str, step: int, *, ema: bool, seed: int) -> Provenance:
        name = Path(sys.argv[0]).name
        # Under python -m stamo_dist.cli it is the path of that file.
        command = shlex.join(["stamo" if name == "__main__.py" else name, *sys.argv[1:]])
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(recipe, None, checkpoint, step, ema, None, code_version(), seed, command, date)


@dataclass(frozen=True)
class Figure:
    file: str  # relative to the result's folder
    caption: str
    task: str = ""  # figures of one task are grouped, …
    side: str = ""  # … and those of its sides placed side by side


@dataclass
class EvaluationResult:
    """One measurement: a table, notes, figures, and provenance.

    `columns` maps the keys of `rows` to headings, in order; rows with equal first values form a group. `stamo report`
    shows any result of this form, and compares the columns in `better` (key → "higher" or "lower") of several runs:
    rows that are equal in all columns of `by` are placed side by side.
    """

    name: str
    title: str
    about: str  # settings of the measurement
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    provenance: Provenance
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    by: list[str] = field(default_factory=list)
    better: dict[str, str] = field(default_factory=dict)
    partial: str | None = None  # progress of a measurement that has not ended

    def write(self, folder: Path) -> None:
        """Write NAME.csv and, last, NAME.json; figures of the replaced result are deleted."""
        target = folder / f"{self.name}.json"
        if target.exists():
            before = {Path(figure["file"]).name for figure in json.loads(target.read_text())["figures"]}
            for file in before - {figure.file for figure in self.figures}:
                (folder / file).unlink(missing_ok=True)
        with (folder / f"{self.name}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(self.columns))
            writer.writeheader()
            writer.writerows(self.rows)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(target, text + "\n")

    def show(self, console: Console, folder: Path) -> None:
        """Print the table, the notes and the output path."""
        if self.partial:
            console.print(f"PARTIAL: {self.partial}", style="bold yellow")
        weights = "averaged weights" if self.provenance.ema else "weights without an average"
        title = f"{self.title} · {self.provenance.recipe}, step {self.provenance.step}, {weights}"
        table = Table(title=title, title_style="bold")
        group = next(iter(self.columns))
        for key, heading in self.columns.items():
            table.add_column(heading, justify="left" if isinstance(self.rows[0][key], str) else "right", no_wrap=True)
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            if before is not None and before[group] != row[group]:
                table.add_section()
            table.add_row(*(show_value(row[key]) for key in self.columns))
        show(console, Whole(table))
        for note in [*self.notes, f"wrote {folder}"]:
            console.print(note, highlight=False, soft_wrap=True)


def show_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"
    return "–" if value is None else str(value)


def output_folder(run: RunFolder, name: str, out: Path | None) -> Path:
    """RUN/eval/NAME, or `out`.

    Raises:
        RunError: It cannot be written.
    """
    folder = out or run.evaluations / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            """It can be written."""
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another with --out") from e
    return folder
