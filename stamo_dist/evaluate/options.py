"""The options of every measurement: a field is an option of its command, with its default, help and limits.

The measurements (`reconstruct.py` and so on) derive from these classes. Nothing here imports torch, so that
`stamo eval --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (the recipe's run_dir).")]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="STEP|best|PATH", help="Which one; the newest whole one when omitted."),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Sampler steps; flow.sampler_steps when omitted.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to write; RUN/eval/NAME when omitted.")
]


@dataclass
class RunOptions:
    """Of a measurement of a run's tokenizer."""

    run: RunArgument
    checkpoint: CheckpointOption = None
    out: OutOption = None


@dataclass
class SharedOptions(RunOptions):
    """Of one that several processes can share."""

    nproc: Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Processes that measure together.")] = 1


@dataclass
class ReconstructOptions(SharedOptions):
    """PSNR and SSIM of reconstructed held-out frames, beside the VAE alone and the mean image.

    Example: stamo eval reconstruct runs/tokenizer_demo --frames 64
    """

    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out frames of each source.")] = 128
    steps: StepsOption = None
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Frames decoded at once.")] = 32


@dataclass
class InterpolateOptions(SharedOptions):
    """Decode the straight line between two states of held-out episodes, beside the real frames between them.

    Example: stamo eval interpolate runs/tokenizer_demo --span 48
    """

    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out episodes of each source.")] = 4
    points: Annotated[int, typer.Option(metavar="N", min=3, help="Pictures on the line, ends included.")] = 9
    start: Annotated[int, typer.Option(metavar="T", min=0, help="Frame of the start state.")] = 0
    span: Annotated[int, typer.Option(metavar="N", min=2, help="Frames from start to goal.")] = 32
    steps: StepsOption = None


@dataclass
class TransferOptions(SharedOptions):
    """Add the motion of one held-out episode to the state of another scene and decode it.

    Example: stamo eval transfer runs/tokenizer_demo --span 48
    """

    pairs: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs of episodes, of each two sources.")] = 2
    points: Annotated[int, typer.Option(metavar="N", min=2, help="Pictures of a motion, the first included.")] = 7
    span: Annotated[int, typer.Option(metavar="N", min=1, help="Frames a motion lasts.")] = 32
    steps: StepsOption = None


@dataclass
class ProbeOptions(SharedOptions):
    """Read the k actions between two frames from their motion: state against pixels, encoder and random weights.

    Started again after a kill it goes on; the features of the frames are kept for the next time.

    Example: stamo eval probe runs/tokenizer_demo --seeds 3
    """

    k: Annotated[
        list[int] | None,
        typer.Option("--k", metavar="N", min=1, help="Frames between the two; may be repeated. 1, 2, 4, 8 if omitted."),
    ] = None
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Heads of each kind, for the spread.")] = 3
    episodes: Annotated[int, typer.Option(metavar="N", min=2, help="Most episodes of each split of a source.")] = 256
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Most epochs a head is trained.")] = 60
    patch_dim: Annotated[int, typer.Option(metavar="N", min=1, help="Most numbers of patch tokens.")] = 4096
    pixels: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Pixel difference: N × N cells; as many numbers as the state when omitted."
        ),
    ] = None
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Frames encoded at once.")] = 64


@dataclass
class SpeedOptions(RunOptions):
    """Frames a second through a tokenizer's encoder, to the state, and back; warm, median and spread.

    Of a policy: moments a second without a world head, with StaMo's, and with one for raw DINOv2 features.

    Example: stamo eval speed recipes/policy_openvla_motion.yaml --device cuda --set policy.weights=null
    """

    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|RECIPE", help="A run folder; or a policy's recipe, timed with random weights."),
    ]
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Frames at once; may be repeated. 1, 16 if omitted.")
    ] = None
    calls: Annotated[int, typer.Option(metavar="N", min=2, help="Timed calls of each part.")] = 30
    device: Annotated[
        list[str] | None, typer.Option(metavar="cpu|cuda", help="May be repeated; all there are if omitted.")
    ] = None
    steps: StepsOption = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Override one value of a recipe; may be repeated."),
    ] = None
