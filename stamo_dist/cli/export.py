"""`stamo export`. Torch is imported only inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.errors import RunError


class Form(str, Enum):
    """Layouts of an exported model."""

    hf = "hf"
    openvla = "openvla"
    peft = "peft"


class DType(str, Enum):
    """Number formats of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="RUN/checkpoints/step_…, or a run folder: its newest checkpoint.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="Folder to write; it must not exist. Without it: the run's own export, RUN/model."
        ),
    ] = None,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="hf: parts that plain diffusers and transformers open. openvla: the layout of the released policies, "
            "which the official code reads. peft: the adapters of a run with policy.lora, without their base.",
        ),
    ] = Form.hf,
    dtype: Annotated[DType, typer.Option(help="Of the trained weights; what was frozen stays as it was.")] = (
        DType.float32
    ),
    which: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="STEP|best", help="Of a run: that one, in place of its newest."),
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Most of one file.")] = "5GB",
) -> None:
    """Write a checkpoint's model for others: safetensors, statistics, and a card with recipe, data and metrics.

    The moving average is taken where the checkpoint has one. What is written can be loaded again as policy.weights,
    model.decoder.weights or model.vae.weights.

    A run that was trained, and whose own export failed, is finished by its folder alone.

    Example: stamo export demo/runs/tokenizer exports/tokenizer

    Example: stamo export runs/policy_openvla_lora exports/policy --format openvla --dtype bfloat16
    """
    import torch

    from stamo_dist.export_layout import ExportLayout
    from stamo_dist.publish.publish import finish, publish

    if out is None:
        if which is not None or (form, dtype, shard_size) != (Form.hf, DType.float32, "5GB"):
            raise RunError("OUT: say where a model of your choice goes; without it the run's own export is written")
        finish(checkpoint)
        return
    publish(checkpoint, out, ExportLayout(form.value, getattr(torch, dtype.value), shard_size), which)
