"""What every measurement shares: the weights of a run, its held-out frames, and where results go."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, named
from stamo_dist.errors import CheckpointError, RunError
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, git_commit, write_atomic
from stamo_dist.tasks.noise import Noise


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from."""

    recipe: str
    data_fingerprint: str | None  # of the mixture it was trained on; null for an export without its checkpoints
    checkpoint: str
    step: int
    ema: bool  # the weights are the moving average
    trained_commit: str | None
    git_commit: str | None  # of the code that measured
    seed: int  # of the run
    command: str
    date: str


@dataclass(frozen=True)
class Figure:
    file: str  # relative to the result's folder
    caption: str
    task: str = ""  # figures of one task stand together, …
    side: str = ""  # … and those of its sides side by side


@dataclass
class Result:
    """One measurement: a table, what was noticed, pictures, and where it comes from.

    `columns` maps the keys of `rows` to headings, in order; rows that share the first are one group. `stamo report`
    shows any result of this form, and puts the columns in `better` (key → "higher" or "lower") of several runs side by
    side: rows that agree in all columns of `by` are compared.
    """

    name: str
    title: str
    about: str  # how it was measured
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    provenance: Provenance
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    by: list[str] = field(default_factory=list)
    better: dict[str, str] = field(default_factory=dict)
    partial: str | None = None  # how much of it is there, of a measurement that has not ended

    def write(self, folder: Path) -> None:
        """Write NAME.csv and, last, NAME.json: what it names is there. Pictures of the result it replaces go."""
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
        """Print the table, the notes and where it was written."""
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
        whole = Measurement.get(console, console.options.update(max_width=400), table).maximum
        width = console.width
        console.width = max(width, whole)  # print's own `width` would be cut to the terminal's
        console.print(table, crop=False, soft_wrap=True)
        console.width = width
        for note in [*self.notes, f"wrote {folder}"]:
            console.print(note, highlight=False, soft_wrap=True)


class Trials:
    """Finished parts of a measurement, a line each, so that a killed one goes on where it was.

    Parts of another `identity` (weights, data, settings) are thrown away.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int = 0):
        self._head = json.dumps(identity, sort_keys=True, default=str)
        self._path = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self._main = not rank
        self._all = lambda: (path, *path.parent.glob(f"{path.stem}.*{path.suffix}"))  # each process writes its own
        self._done = dict[str, Any]()
        for file in self._all():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            head, *lines = file.read_text().splitlines()
        except (FileNotFoundError, ValueError):  # the first process has removed it, or it is empty
            return
        if head != self._head:
            if self._main:
                file.unlink()
            return
        for line in lines:
            try:
                part = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            self._done[part["part"]] = part["value"]

    def __len__(self) -> int:
        return len(self._done)

    def known(self, parts: Iterable[str]) -> dict[str, Any]:
        """Those of `parts` that are measured."""
        return {part: self._done[part] for part in parts if part in self._done}

    def get(self, part: str, measure: Callable[[], Any]) -> Any:
        """What an earlier start measured, or measure it now; the value must be what JSON can hold."""
        if part not in self._done:
            self._done[part] = value = measure()
            if not self._path.is_file():
                write_atomic(self._path, self._head + "\n")
            with self._path.open("a") as f:
                f.write("\n" + json.dumps({"part": part, "value": value}))
        return self._done[part]

    def close(self) -> None:
        """All is measured and written elsewhere: the first process removes the parts of all."""
        for file in self._all() if self._main else ():
            file.unlink(missing_ok=True)


def known(value: float) -> float | None:
    """What JSON and the tables hold for a number that could not be measured: nothing."""
    return None if math.isnan(value) else value


def partial(done: int, wanted: int, what: str) -> str | None:
    """`Result.partial`."""
    return None if done == wanted else f"{done} of {wanted} {what} are measured"


def show_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"
    return "–" if value is None else str(value)


def read_recipe(run: RunFolder) -> Recipe:
    """The resolved recipe of a tokenizer's run.

    Raises:
        RunError: The run trains something else.
    """
    recipe = load(run.resolved).recipe
    if recipe.stage != "tokenizer":
        raise RunError(f"{run.path}: its recipe trains the {recipe.stage} stage; give the run folder of a tokenizer")
    return recipe


def load_tokenizer(run: RunFolder, recipe: Recipe, checkpoint: str | None = None) -> tuple[Tokenizer, Provenance]:
    """The tokenizer of a run in fp32, on the GPU where there is one, with the averaged weights where they were kept.

    `checkpoint`: a step, or the path of a checkpoint. When omitted, the newest whole checkpoint; the run's export
    (`model/`) when it has none.

    Raises:
        CheckpointError: No such checkpoint, or none yet.
        RecipeError: The recipe's frozen parts cannot be built.
    """
    path = _find_checkpoint(run, checkpoint)
    if path is None:
        tokenizer = Tokenizer.from_pretrained(run.model)
        source, step, ema = str(run.model), recipe.train.steps, recipe.train.ema is not None
        fingerprint, trained_commit = None, None
    else:
        marker = read_checkpoint_manifest(path)
        tokenizer = Tokenizer.from_config(recipe.model, recipe.flow, recipe.data.image_size)
        tokenizer.trained.load_state_dict(read_weights(path))
        source, step, ema = str(path), marker.state.step, (path / "ema").is_dir()
        fingerprint, trained_commit = marker.fingerprint, marker.git_commit
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return tokenizer, Provenance(
        recipe=recipe.name, data_fingerprint=fingerprint, checkpoint=source, step=step, ema=ema,
        trained_commit=trained_commit, git_commit=git_commit(), seed=recipe.seed,
        command=typed_command(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def typed_command() -> str:
    """What the user typed."""
    name = Path(sys.argv[0]).name
    return shlex.join(["stamo" if name == "__main__.py" else name, *sys.argv[1:]])  # so under python -m stamo_dist.cli


def _find_checkpoint(run: RunFolder, checkpoint: str | None) -> Path | None:
    if checkpoint is not None:
        return named_checkpoint(run, checkpoint)
    whole, broken = complete(run.checkpoints)
    if whole:
        return whole[0]
    if (run.model / "stamo.json").is_file():
        return None
    why = "".join(f"\n  {b}" for b in broken)
    raise CheckpointError(
        f"{run.path}: no checkpoint yet; train on until the first is saved (train.checkpoint.every){why}"
    )


def named_checkpoint(run: RunFolder, name: str) -> Path:
    """What `--checkpoint` names: a step, `best`, or a path.

    Raises:
        CheckpointError: There is none.
    """
    try:
        return named(run.checkpoints, name)
    except CheckpointError as e:
        raise CheckpointError(f"--checkpoint {e}") from None


def sampler_noise(tokenizer: Tokenizer, samples: Sequence[int], stream: int = 1) -> Tensor:
    """Noise of these samples, (B, C, h, w): step 0 of seed 0, which no training step uses, the same for every run."""
    ids = torch.tensor(samples, dtype=torch.int64, device=tokenizer.device)
    return Noise(0).at(0).normal(ids, tokenizer.latent_shape, stream)


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


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
