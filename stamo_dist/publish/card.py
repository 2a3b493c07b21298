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

_USE = {
    "tokenizer": """\
```python
from stamo_dist.models.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained(".")
states = tokenizer.encode(frames)  # uint8 (B, H, W, 3) → (B, tokens, dim)
```

`transformer/` and `vae/` open with diffusers (`SD3Transformer2DModel`, `AutoencoderKL`), `encoder/`, where it was
trained, with transformers (`Dinov2Model`).""",
    "vae": """\
```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".")
```""",
    "policy": """\
```python
from stamo_dist.models.openvla.policy import Policy

policy = Policy.from_pretrained(".")
actions = policy.act(frame, "open the drawer", unnorm_key="SOURCE")
```

`dataset_statistics.json` turns the policy's numbers into the units of each source.""",
    "diffusion policy": """\
```python
from stamo_dist.models.policies import load_policy

policy = load_policy(".")
actions = policy.act(frame, "open the drawer", unnorm_key="SOURCE")
```

`dataset_statistics.json` turns the policy's numbers into the units of each source.""",
}
_HF_POLICY = """
The language model opens with plain transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("language_model")
tokenizer = AutoTokenizer.from_pretrained("language_model")
```"""
_OFFICIAL = """
The layout is that of openvla-7b and OpenVLA-OFT: with the official code (`trust_remote_code=True`, fetched from
`openvla/openvla-7b`) `AutoModelForVision2Seq` and `AutoProcessor` open it; a world head beside it is not read there."""

_PEFT = """
These are PEFT's adapters and what else was trained; the base is fetched from where `adapter_config.json` says."""


def model_card(recipe: Recipe, run: RunFolder, checkpoint: Path, layout: ExportLayout, *, trained: nn.Module) -> str:
    """The card in Markdown: model, usage, training data and settings, measurements."""
    marker = read_checkpoint_manifest(checkpoint)
    parameters = sum(p.numel() for p in trained.parameters())
    dtype = str(layout.dtype or "torch.float32").removeprefix("torch.")
    diffusion = recipe.stage == "policy" and recipe.policy.diffusion is not None
    use = _USE["diffusion policy" if diffusion else recipe.stage]
    if recipe.stage == "policy" and not diffusion:
        use += "\n" + {"hf": _HF_POLICY, "openvla": _OFFICIAL, "peft": _PEFT}[layout.form]
    parts = [
        f"---\nlibrary_name: stamo-dist\ntags: [robotics, {recipe.stage}]\n---",
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
    names = [k for k in line if isinstance(line[k], float) and not k.startswith(("samples", "data_wait", "comm_wait"))]
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
