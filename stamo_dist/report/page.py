"""Collects the data of run folders into one self-contained HTML page; images are data URIs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stamo_dist.checkpoint.compatibility import growth_of
from stamo_dist.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete
from stamo_dist.data.schema import read_manifest
from stamo_dist.errors import DataError, RunError
from stamo_dist.recipe.data import SourceConfig
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.report.charts import COLOURS, Series, line_chart
from stamo_dist.report.pictures import embed
from stamo_dist.run import lineage
from stamo_dist.run.folder import RunFolder, open_run, write_atomic
from stamo_dist.run.history import Sample, sample
from stamo_dist.run.recipe_history import changes_of
from stamo_dist.run.success import Successes
from stamo_dist.tracking.metrics_file import read_metrics
from stamo_dist.words import duration

_SHOWN = ("title", "about", "columns", "rows", "notes", "settings", "provenance")
_FIRST = (
    "reconstruct",
    "interpolate",
    "transfer",
    "probe",
    "plan",
    "rollout_suites",
    "rollout",
    "during",
    "speed",
)  # evaluations shown first; the rest follow by name


@dataclass(frozen=True)
class ReportedRun:
    """The data of one run for the page."""

    folder: RunFolder
    recipe: Recipe
    history: Sample  # a sample of its metric lines
    checkpoints: list[tuple[str, CheckpointManifest]]  # newest first
    environment: dict[str, Any]
    starts: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self.history.objects

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    def behind(self, evaluation: Mapping[str, Any]) -> str:
        """That a measurement is of an earlier step than the run's; "" if it is not, or its rows name their steps."""
        step = evaluation["provenance"].get("step")
        if step is None or step >= self.step or "step" in evaluation["columns"]:
            return ""
        return f"of step {step:,}; the run is at {self.step:,}"

    @property
    def facts(self) -> dict[str, str]:
        """Headline figures."""
        train = self.recipe.train
        facts: dict[str, str] = {"stage": self.recipe.stage}
        facts["step"] = f"{self.step:,} of {train.steps:,}"
        if self.metrics:
            even = self.history.even
            tail = even[-max(1, len(even) // 20) :]
            losses = [line["loss"] for line in tail if line["loss"] is not None]
            facts["loss (last 5 %)"] = f"{fmean(losses):.4f}" if losses else "not finite"
            facts["samples/s, median of the run"] = f"{median(line['samples_per_second'] for line in even):,.1f}"
            facts["waiting for data, mean of the run"] = f"{fmean(line['data_wait'] for line in even):.1%}"
            if waits := [line["comm_wait"] for line in even if "comm_wait" in line]:
                facts["waiting for other ranks, mean of the run"] = f"{fmean(waits):.1%}"
            if peaks := [line["peak_gb"] for line in even if "peak_gb" in line]:
                facts["GPU memory"] = f"{max(peaks):.4g} GB at most"
            if "mfu" in self.metrics[-1]:
                facts["MFU, median of the run"] = f"{median(line.get('mfu', 0.0) for line in even):.1%}"
            facts["trained for"] = duration(self.metrics[-1]["seconds"])
        if best := Successes.read(self.folder.path).best:
            facts["best success"] = f"{best.success:.0f} % @ {best.step:,}"
        facts["global batch"] = str(train.batches)
        facts["strategy"] = f"{self.recipe.strategy.name}, {train.precision}"
        return facts

    @property
    def changes(self) -> list[tuple[int, dict[str, list[str]]]]:
        """(step, recipe field → [old, new]) of each start with another recipe than the one before."""
        return changes_of(self.folder)

    @property
    def failing_nodes(self) -> list[tuple[str, str, str, str]]:
        """(when, nodes that a start failed on, nodes that the run was kept off since, why)."""
        found, off = list[tuple[str, str, str, str]](), list[str]()
        for event in sample(self.folder.path / "launch" / "events.jsonl").objects:
            if event.get("event") in ("submitted", "requeued"):
                changed, off = event.get("avoids", []) != off, event.get("avoids", [])
            else:
                changed = bool(event.get("blamed"))
            if changed:
                when = str(event.get("time", ""))[:19].replace("T", " ")
                blamed, avoided = (", ".join(map(str, event.get(key) or ())) for key in ("blamed", "avoids"))
                found.append((when, blamed, avoided, str(event.get("cause") or event.get("reason", ""))))
        return found

    @property
    def left_out(self) -> list[str]:
        """Lines on what the page leaves out of metrics.jsonl."""
        history, said = self.history, list[str]()
        if history.last is not None:
            size, count = self.folder.metrics.stat().st_size, len(history.objects) - history.last
            said.append(
                f"metrics.jsonl is long ({size / 1e9:.1f} GB): the curves and means are of {count:,} of its lines at "
                f"equal distances, the curves also of all of its last {history.last}"
            )
        if history.damaged:
            said.append(f"lines of metrics.jsonl that cannot be read and are left out: {history.damaged}")
        return said

    @property
    def charts(self) -> list[tuple[str, Markup]]:
        """(title, SVG) of every curve with points; what training does is marked where the recipe changed."""
        marks = [step for step, _ in self.changes]
        sources = [key for key in (self.metrics[-1] if self.metrics else {}) if key.startswith("loss/")]
        found = [*_success_charts(self.evaluations), ("loss", line_chart([self.curve("loss")], marks=marks))]
        if len(sources) > 1:
            curves = [self.curve(key, label=key.partition("/")[2]) for key in sources]
            found.append(("loss per source", line_chart(curves, marks=marks)))
        found += [
            ("samples per step", line_chart([self.curve("global_batch")], smooth=False, zero=True)),
            ("samples per second", line_chart([self.curve("samples_per_second")], zero=True)),
            ("share of the step waiting for data, %", line_chart([self.curve("data_wait", scale=100)], zero=True)),
            (
                "share of the step waiting for other ranks, %",
                line_chart([self.curve("comm_wait", scale=100)], zero=True),
            ),
            ("most GPU memory of a step, GB", line_chart([self.curve("peak_gb")], zero=True)),
            ("gradient norm", line_chart([self.curve("grad_norm")], zero=True, marks=marks)),
            ("learning rate", line_chart(self.rates, smooth=False, zero=True, marks=marks)),
        ]
        return [(title, chart) for title, chart in found if chart]

    @property
    def rates(self) -> list[Series]:
        """The schedule's rate, and those of parameters with their own."""
        own = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("lr/"))
        whole = self.curve("lr", label="lr" if own else None)
        return [whole, *(self.curve(key, label=key.partition("/")[2]) for key in list(own)[: COLOURS - 1])]

    def curve(self, key: str, label: str | None = None, scale: float = 1.0) -> Series:
        points = [(line["step"], scale * line[key]) for line in self.metrics if line.get(key) is not None]
        return Series(label or self.recipe.name, [x for x, _ in points], [y for _, y in points])

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """Each source: its share as asked for and as trained on up to the newest checkpoint."""
        active, shares = self.recipe.data.used, self.recipe.data.first_shares() or {}
        seen = self.checkpoints[0][1].state.samples if self.checkpoints else []
        growth = growth_of(self.checkpoints[0][1].recipe) if self.checkpoints else {}
        rows = []
        for i, (name, source) in enumerate(active.items()):
            samples = seen[i] if i < len(seen) else None
            frames = _frames(source, growth.get(name))
            realised = samples / max(1, sum(seen)) if samples is not None else None
            epochs = samples / frames if samples is not None and frames else None
            row = {"source": name, "path": ", ".join(source.paths), "requested": shares.get(name), "samples": samples}
            rows.append({**row, "realised": realised, "frames": frames, "epochs": epochs})
        return rows

    @property
    def lineage(self) -> list[str]:
        """Where it comes from, and what began from it."""
        return lineage.lines(self.folder.path)

    @property
    def command(self) -> str:
        return shlex.join(self.environment.get("command", []))

    @property
    def first_batch(self) -> dict[str, Any] | None:
        picture = self.folder.path / "first_batch.png"
        return embed(picture) if picture.is_file() else None

    def traces(self, page: Path) -> list[tuple[str, str]]:
        """Files of `train.profile`, below the run folder, and where a page in the folder `page` finds them."""
        files = sorted(self.folder.profile.glob("*_*"))
        return [(f"{f.parent.name}/{f.name}", quote(os.path.relpath(f, page))) for f in files]

    @property
    def resolved(self) -> str:
        return self.folder.resolved.read_text()


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about these runs and return its path: `out`, or report.html in the first run's folder.

    Raises:
        RunError: One is not a run folder, a file of its evaluations is damaged, or `out` cannot be written.
    """
    loaded = [read_run(open_run(path)) for path in runs]
    target = Path(out) if out else loaded[0].folder.path / "report.html"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": lambda v: "–" if v is None else f"{v:.1%}"}
    template = environment.from_string((resources.files(__package__) / "page.html.j2").read_text(encoding="utf-8"))
    together = {
        "loss": line_chart([run.curve("loss", label=_label(run, loaded)) for run in loaded]),
        "samples per second": line_chart(
            [run.curve("samples_per_second", label=_label(run, loaded)) for run in loaded], zero=True
        ),
    }
    labels = [_label(run, loaded) for run in loaded]
    compared = compare(loaded)
    page = template.render(runs=loaded, labels=labels, together=together, compared=compared, page=target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, page)
    except OSError as e:
        raise RunError(f"{target}: cannot be written ({e.strerror}); choose another with --out") from e
    return target


def compare(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Evaluations that at least two runs have: for each row its label, and each run's numbers by column.

    If a run has several results of one name, the one in the folder of that name is used.
    """
    tables: dict[str, list[dict[str, Any] | None]] = {}
    for i, run in enumerate(runs):
        for found in run.evaluations:
            if found["by"] and found["place"] == found["name"]:
                tables.setdefault(found["name"], [None] * len(runs))[i] = found
    compared = []
    for several in tables.values():
        there = [table for table in several if table is not None]
        if len(there) < 2:
            continue
        by, better, headings = there[0]["by"], there[0]["better"], there[0]["columns"]
        indexed = [{tuple(row.get(k) for k in by): row for row in table["rows"]} if table else {} for table in several]
        rows = []
        for key in dict.fromkeys(key for table in indexed for key in table):
            cells: list[tuple[Any, bool]] = []
            for column, direction in better.items():
                values = [table.get(key, {}).get(column) for table in indexed]
                finite = [value for value in values if value is not None]
                best = (max if direction == "higher" else min)(finite) if len(set(finite)) > 1 else None
                cells += [(value, value is not None and value == best) for value in values]
            rows.append({"key": key, "cells": cells})
        columns = [headings.get(column, column) for column in better]
        behind = [run.behind(table) if table else "" for run, table in zip(runs, several, strict=True)]
        found = {"title": there[0]["title"], "by": [headings[k] for k in by], "rows": rows, "columns": columns}
        compared.append({**found, "behind": behind})
    return compared


def read_run(folder: RunFolder) -> ReportedRun:
    return ReportedRun(
        folder=folder,
        recipe=load(folder.resolved).recipe,
        history=read_metrics(folder.metrics),
        checkpoints=[(path.name, read_checkpoint_manifest(path)) for path in complete(folder.checkpoints)[0]],
        environment=_read_json(folder.path / "env.json") if (folder.path / "env.json").is_file() else {},
        starts=sample(folder.path / "starts.jsonl").objects,
        evaluations=[_read_evaluation(path) for path in sorted(folder.evaluations.glob("*/*.json"), key=_place)],
    )


def _success_charts(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """A policy's success over the steps of its training: of all trials with its interval, and task by task."""
    rows: list[dict[str, Any]] = next((e["rows"] for e in evaluations if e["name"] == e["place"] == "during"), [])
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("success") is not None:
            curves.setdefault(f"{row['suite']}/{row['task']}", []).append(row)
    lines = {
        name: Series(name.partition("/")[2], *([row[k] for row in points] for k in ("step", "success", "low", "high")))
        for name, points in curves.items()
    }
    whole = [line for name, line in lines.items() if line.label == "all tasks"]
    tasks = [replace(line, low=(), high=()) for name, line in lines.items() if line.label != "all tasks"]
    charts = [("success in closed loop, %, and its 95 % interval", whole)] if whole else []
    charts += [("success in closed loop, task by task, %", tasks)] if 1 < len(tasks) <= COLOURS else []
    return [(title, line_chart(found, smooth=False, within=(0, 100))) for title, found in charts]


def _place(path: Path) -> tuple[int, str]:
    return (_FIRST.index(path.stem) if path.stem in _FIRST else len(_FIRST)), path.stem


def _read_evaluation(path: Path) -> dict[str, Any]:
    result = _read_json(path)
    try:
        figures = [{**figure, **embed(_inside(path.parent, figure["file"]))} for figure in result["figures"]]
        shown = {key: result[key] for key in _SHOWN}
        kept = {"by": result.get("by", []), "better": result.get("better", {}), "partial": result.get("partial")}
        drawn = {"figures": figures, "tasks": _tasks(figures)}
        return {"name": path.stem, "place": path.parent.name, **shown, **kept, **drawn}
    except (KeyError, TypeError, OSError) as e:
        raise RunError(f"{path}: is not a whole result ({e}); run that `stamo eval` again or delete it") from e


def _inside(folder: Path, name: str) -> Path:
    """A picture of the evaluations, of which `folder` is one.

    Raises:
        OSError: It lies elsewhere, and would get into a page that is passed on.
    """
    picture = folder / name
    if not picture.resolve().is_relative_to(folder.parent.resolve()):
        raise OSError(f"{name} lies outside of {folder.parent}")
    return picture


def _tasks(figures: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task → side → its figures."""
    paired = [figure for figure in figures if figure.get("task")]
    return {
        task: {side: [f for f in paired if (f["task"], f["side"]) == (task, side)] for side in ("succeeded", "failed")}
        for task in dict.fromkeys(figure["task"] for figure in paired)
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise RunError(f"{path}: is damaged ({e}); write it again or delete it") from e


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"
    return "–" if value is None else str(value)


def _frames(source: SourceConfig, growth: Sequence[int] | None) -> int | None:
    """Number of training frames of a source over the cameras used, as of the run; None without its shards."""
    try:
        grown = [*growth, *[0] * len(source.paths)] if growth is not None else [None] * len(source.paths)
        manifests = [
            read_manifest(Path(path).expanduser()).as_of(n) for path, n in zip(source.paths, grown, strict=False)
        ]
        return sum(m.splits[source.split].frames * len(source.cameras or m.cameras) for m in manifests)
    except (DataError, KeyError):
        return None


def _label(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    """The recipe's name, with the folder if two runs share it."""
    shared = sum(other.recipe.name == run.recipe.name for other in runs) > 1
    return f"{run.recipe.name} ({run.folder.path})" if shared else run.recipe.name
