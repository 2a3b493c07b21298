"""The README.md of an exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from stamo_dist.checkpoint.compatibility import sources_of
from stamo_dist.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run import lineage
from stamo_dist.run.folder import RunFolder
from stamo_dist.tasks.base import ExportLayout
from stamo_dist.tracking.metrics_file import last_metrics
from stamo_dist.tracking.system import SYSTEM


def model_card(
    recipe: Recipe, run: RunFolder, checkpoint: Path, layout: ExportLayout, *, trained: nn.Module, use: str
) -> str:
    """The card in Markdown: model, usage (`use`), training data and settings, measurements."""
    marker = read_checkpoint_manifest(checkpoint)
    parameters = sum(p.numel() for p in trained.parameters())
    dtype = str(layout.dtype or "torch.float32").removeprefix("torch.")
    parts = [
        f"---\nlibrary_name: stamo-dist\npipeline_tag: robotics\ntags: [robotics, {recipe.stage}]\n---",
        f"# {recipe.name}",
        f"A {recipe.stage} of {parameters / 1e6:.1f} M parameters, {dtype}, written by stamo-dist from step "
        f"{marker.state.step} of {recipe.train.steps}.",
        "## Use",
        use,
        "## Data",
        _data(marker),
        "## Metrics",
        _metrics(run, marker),
        *_evaluations(run),
        *_weights(marker),
        *_lineage(run),
        "## Recipe",
        f"```yaml\n{run.resolved.read_text(encoding='utf-8').rstrip()}\n```",
        f"Code: `{marker.git_commit or 'unknown'}`. Strategy {marker.strategy} on {marker.world_size} "
        f"processes, {marker.precision}.",
    ]
    return "\n\n".join(parts) + "\n"


def _data(marker: CheckpointManifest) -> str:
    seen = dict(zip(sources_of(marker.recipe), marker.state.samples, strict=False))
    rows = [[name, marker.recipe[f"data.sources.{name}.shards"], f"{seen.get(name, 0):,}"] for name in seen]
    table = _table(["source", "shards", "samples trained on"], rows)
    return f"Fingerprint of the mixture: `{marker.fingerprint}`.\n\n{table}"


def _weights(marker: CheckpointManifest) -> Iterator[str]:
    if marker.sources:
        yield "## Weights that it began with\n\n" + _table(["", ""], [[*row] for row in marker.sources.items()])


def _lineage(run: RunFolder) -> Iterator[str]:
    if found := lineage.lines(run.path):
        yield "## Lineage\n\n" + "\n".join(f"- {line}" for line in found)


def _metrics(run: RunFolder, marker: CheckpointManifest) -> str:
    line = last_metrics(run.metrics, marker.state.step)
    if line is None:
        return "None were kept."
    names = [
        k
        for k in line
        if isinstance(line[k], float) and not k.startswith(("samples", "data_wait", "comm_wait", SYSTEM))
    ]
    rows = [[name, f"{line[name]:.5g}"] for name in names]
    return f"In training, at step {line['step']}:\n\n" + _table(["", ""], rows)


def _evaluations(run: RunFolder) -> Iterator[str]:
    """The results of `stamo eval` for the run."""
    for path in sorted(run.evaluations.glob("*/*.json")):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"title", "columns", "rows"} <= set(result):
            continue
        columns = result["columns"]
        rows = [["" if row.get(key) is None else _short(row[key]) for key in columns] for row in result["rows"]]
        yield f"### {result['title']}\n\n{_table(list(columns.values()), rows)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
