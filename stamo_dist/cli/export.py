"""`stamo export`. Torch is imported only inside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stamo_dist.command_options import with_options
from stamo_dist.errors import RunError
from stamo_dist.faults.ended import says_if_ended
from stamo_dist.run.registry import run_names

if TYPE_CHECKING:
    from stamo_dist.publish.push import HubRepository


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


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's model for others: safetensors, statistics, and a card with recipe, data and metrics.

    The moving average is taken where the checkpoint has one. What is written can be loaded again as policy.weights,
    model.decoder.weights or model.vae.weights. With --push it is uploaded to the Hub; with an exported folder as CKPT,
    and no OUT, that folder is.

    A run that was trained, and whose own export failed, is finished by its folder alone.

    Example: stamo export demo/runs/tokenizer exports/tokenizer

    Example: stamo export runs/policy_openvla_lora exports/policy --format openvla --dtype bfloat16

    Example: stamo export exports/tokenizer --push my-lab/tokenizer --private
    """

    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="RUN/checkpoints/step_…, or a run, its folder or name: its newest checkpoint.",
            autocompletion=run_names,
        ),
    ]
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="Folder to write; it must not exist. Without it: the run's own export, RUN/model."
        ),
    ] = None
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="hf: parts that plain diffusers and transformers open. openvla: the layout of the released policies, "
            "which the official code reads. peft: the adapters of a run with policy.lora, without their base.",
        ),
    ] = Form.hf
    dtype: Annotated[DType, typer.Option(help="Of the trained weights; what was frozen stays as it was.")] = (
        DType.float32
    )
    which: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="STEP|best", help="Of a run: that one, in place of its newest."),
    ] = None
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Most of one file.")] = "5GB"
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload OUT to this model repository of the Hub."),
    ] = None
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False
    update: Annotated[bool, typer.Option("--update", help="With --push: replace what the repository has.")] = False

    def check(self) -> None:
        """Raises: RunError: Options that do not go together."""
        if self.out is None and (self.which is not None or (self.form, self.dtype, self.shard_size) != _AS_THEY_ARE):
            raise RunError("OUT: say where a model of your choice goes; without it the run's own export is written")
        if self.push is None and (self.private or self.update):
            raise RunError("--private, --update: say where to, with --push OWNER/NAME")


_AS_THEY_ARE = (Form.hf, DType.float32, "5GB")


@with_options(ExportOptions)
def export(_: typer.Context, asked: ExportOptions) -> None:
    from stamo_dist.launch.status import folder_of

    asked.check()
    if asked.out is not None or asked.push is None:  # else it is an exported folder
        asked = replace(asked, checkpoint=folder_of(asked.checkpoint))
    if asked.out is not None and ".." in asked.out.parts:  # a folder that is not there, with .. after it, is not made
        asked = replace(asked, out=asked.out.resolve())
    hub = _looked_at(asked)

    import torch

    from stamo_dist.export_layout import ExportLayout
    from stamo_dist.publish.publish import finish, publish

    with says_if_ended(""):
        if asked.out is not None:
            layout = ExportLayout(asked.form.value, getattr(torch, asked.dtype.value), asked.shard_size)
            publish(asked.checkpoint, asked.out, layout, asked.which)
        elif hub is None:
            finish(asked.checkpoint)
    if hub is not None:
        folder = asked.out or asked.checkpoint
        with says_if_ended(f"{folder} is whole", hub.again(folder)):
            address = hub.upload(folder)
        print(f"uploaded {folder} to {asked.push}: {address}")


def _looked_at(asked: ExportOptions) -> HubRepository | None:
    """The repository to push to, once all that can be wrong has been looked at that needs no torch."""
    from stamo_dist.publish.choice import choose, finished
    from stamo_dist.publish.push import HubRepository, check_exported

    if asked.out is not None:
        choose(asked.checkpoint, asked.out, asked.form.value, asked.shard_size, asked.which)
    elif asked.push is None:
        finished(asked.checkpoint)
    else:
        check_exported(asked.checkpoint, asked.push)
    return None if asked.push is None else HubRepository(asked.push, private=asked.private, update=asked.update)
