"""The skeleton of a measurement: open, measure in parts, write intermediate results, and show the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stamo_dist.evaluate.held_out import HeldOutSource, open_sources
from stamo_dist.evaluate.metrics import means
from stamo_dist.evaluate.options import RunOptions
from stamo_dist.evaluate.result import EvaluationResult, Figure, Provenance, output_folder
from stamo_dist.evaluate.run_recipe import read_recipe
from stamo_dist.evaluate.weights import load_tokenizer
from stamo_dist.evaluate.workers import WorkerGroup
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run

Part = TypeVar("Part")
Value = TypeVar("Value")


class Measurement(ABC):
    """One measurement; a subclass also derives from its options in `options.py`, which are the constructor's arguments.

    `evaluate` calls `open`, which sets `folder` and `provenance`, and writes each of the `results`.
    """

    name: ClassVar[str]  # name of the result's files and of its folder in RUN/eval/
    title: ClassVar[str]
    about: ClassVar[str]
    columns: ClassVar[Mapping[str, str]] = {}  # this and the next two: as in `EvaluationResult`
    by: ClassVar[Sequence[str]] = ()
    better: ClassVar[Mapping[str, str]] = {}

    group = WorkerGroup()
    console: Console
    bar: Progress
    folder: Path
    provenance: Provenance

    def evaluate(self, console: Console | None = None, group: WorkerGroup = WorkerGroup()) -> EvaluationResult | None:  # noqa: B008
        """Measure, and write and print the result; None if parts of other processes are missing.

        A killed measurement resumes. `group`: processes that measure together; the first one writes.

        Raises:
            StamoError: Raised by `open`; nothing was written.
        """
        self.group, self.console = group, group.console(console)
        self.open()
        result = None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console) as self.bar:
            for result in self.results():
                if group.main:
                    result.write(self.folder)
        if result is not None:
            self.show(result)
        return result

    @abstractmethod
    def open(self) -> None:
        """Open the model or run to measure; sets `folder` and `provenance`.

        Raises:
            StamoError: It cannot be measured; nothing was written.
        """

    @abstractmethod
    def results(self) -> Iterator[EvaluationResult]:
        """Measure, yielding results; each replaces the one before, the last is complete."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that affect the numbers, recorded in the result's file."""

    def show(self, result: EvaluationResult) -> None:
        """Print the last result."""
        result.show(self.console, self.folder)

    def result(self, rows: list[dict[str, Any]], **rest: Any) -> EvaluationResult:
        """Make a result; `rest`: other fields, overriding those of the class."""
        own = {"name": self.name, "title": self.title, "about": self.about, "columns": dict(self.columns)}
        own |= {"by": list(self.by), "better": dict(self.better)}
        return EvaluationResult(**own | rest, rows=rows, settings=self.settings(), provenance=self.provenance)


class TokenizerMeasurement(RunOptions, Measurement):
    """A measurement of a run's tokenizer."""

    unrecorded: ClassVar[Sequence[str]] = ()  # options that do not change the numbers
    steps: int | None = None

    run_folder: RunFolder
    recipe: Recipe
    tokenizer: Tokenizer

    def open(self) -> None:
        self.run_folder = open_run(self.run)
        self.recipe = read_recipe(self.run_folder)
        self.select()
        self.tokenizer, self.provenance = load_tokenizer(self.run_folder, self.recipe, self.checkpoint)
        self.folder = output_folder(self.run_folder, self.name, self.out)

    def select(self) -> None:
        """Select the items to measure, and raise if that is impossible, before the weights are read."""

    @cached_property
    def sources(self) -> dict[str, HeldOutSource]:
        """The recipe's sources by name.

        Raises:
            DataError: One cannot be read or has no held-out split.
        """
        return {source.name: source for source in open_sources(self.recipe)}

    @property
    def sampler_steps(self) -> int:
        return self.steps or self.recipe.flow.sampler_steps

    def settings(self) -> dict[str, Any]:
        left_out = {"run", "checkpoint", "out", "nproc", *self.unrecorded}
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {**found, "steps": self.sampler_steps} if "steps" in found else found

    def identity(self) -> dict[str, Any]:
        """All settings that affect the numbers: parts measured under another identity are not reused."""
        checksums = {source.name: [source.camera, source.train.manifest.checksums] for source in self.sources.values()}
        return {**self.settings(), "tokenizer": self.tokenizer.fingerprint(), "data": checksums}


class PartwiseMeasurement(TokenizerMeasurement, Generic[Part, Value]):
    """A measurement whose table is computed from independent parts, which are divided among processes."""

    noun: ClassVar[str]  # unit of the counts, e.g. frames

    parts: Mapping[str, Part]  # name → part; names are stable across starts; set by `select`

    @abstractmethod
    def select(self) -> None:
        """Set `parts`."""

    @abstractmethod
    def measure(self, part: Part) -> Value:
        """The JSON value of a part; may also draw the part's figures into `folder`."""

    @abstractmethod
    def scores(self, done: Mapping[str, Value]) -> dict[str, dict[str, list[list[float]]]]:
        """Scores of the finished parts: row group → image row → scores, whose means are the last columns of a row."""

    def rows(self, done: Mapping[str, Value]) -> list[dict[str, Any]]:
        """A table row for each image row of a group: both names, the number of scores, and their means."""
        return [
            dict(zip(self.columns, (group, kind, len(table), *means(table)), strict=True))
            for group, tables in self.scores(done).items()
            for kind, table in tables.items()
        ]

    @abstractmethod
    def figures(self, done: Mapping[str, Value]) -> list[Figure]:
        """The figures of the finished parts."""

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return []

    def count(self, part: Part) -> int:
        """The number of `noun` in a part."""
        return 1

    def results(self) -> Iterator[EvaluationResult]:
        total = sum(map(self.count, self.parts.values()))
        watched = self.bar.add_task(self.noun, total=total)
        finished = self.group.open_parts(self.folder / f"{self.name}.parts.jsonl", self.identity())
        for done in self.group.map(finished, self.parts, self.measure):
            count = sum(self.count(self.parts[name]) for name in done)
            self.bar.update(watched, completed=count)
            rows = self.rows(done)
            yield self.result(
                rows, figures=self.figures(done), notes=self.notes(rows), partial=how_much(count, total, self.noun)
            )
        finished.close()


def by_group(
    done: Mapping[str, Mapping[str, list[float]]], group: Callable[[str], str], kinds: Sequence[str]
) -> dict[str, dict[str, list[list[float]]]]:
    """`PartwiseMeasurement.scores` for parts whose value is image row → scores; `group`: the group of a part."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, scores in done.items():
        tables = found.setdefault(group(name), {kind: [] for kind in kinds})
        for kind in kinds:
            tables[kind].append(scores[kind])
    return found


def how_much(done: int, wanted: int, what: str) -> str | None:
    """The text of `EvaluationResult.partial`."""
    return None if done == wanted else f"{done} of {wanted} {what} are measured"
