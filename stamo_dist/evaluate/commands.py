"""`stamo eval …`: measure a tokenizer or a policy. Torch is imported only inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.evaluate.use_options import (
    ActionsOption,
    AsOption,
    BoundsOption,
    CamerasOption,
    ChunkOption,
    CropOption,
    OrientationOption,
    ViewsOption,
)
from stamo_dist.evaluate.use_options import split as names

app = typer.Typer(no_args_is_help=True, help="Measure a tokenizer or a policy on held-out episodes.")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (the recipe's run_dir).")]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="STEP|best|PATH", help="Which one; the newest whole one when omitted."),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Sampler steps; flow.sampler_steps when omitted.")
]
ProcessesOption = Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Processes that measure together.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to write; RUN/eval/NAME when omitted.")
]


@app.command()
def reconstruct(
    context: typer.Context,
    run: RunArgument,
    *,
    nproc: ProcessesOption = 1,
    checkpoint: CheckpointOption = None,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out frames of each source.")] = 128,
    steps: StepsOption = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Frames decoded at once.")] = 32,
    out: OutOption = None,
) -> None:
    """PSNR and SSIM of reconstructed held-out frames, beside the VAE alone and the mean image.

    Example: stamo eval reconstruct runs/tokenizer_demo --frames 64
    """
    from stamo_dist.evaluate.crew import Crew, run_crew
    from stamo_dist.evaluate.reconstruct import reconstruct as measure

    def body(crew: Crew) -> None:
        measure(run, checkpoint=checkpoint, frames=frames, steps=steps, batch=batch, out=out, crew=crew)

    run_crew(run, nproc, context.obj, body, sys.argv[1:])


@app.command()
def interpolate(
    context: typer.Context,
    run: RunArgument,
    *,
    nproc: ProcessesOption = 1,
    checkpoint: CheckpointOption = None,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out episodes of each source.")] = 4,
    points: Annotated[int, typer.Option(metavar="N", min=3, help="Pictures on the line, ends included.")] = 9,
    start: Annotated[int, typer.Option(metavar="T", min=0, help="Frame of the start state.")] = 0,
    span: Annotated[int, typer.Option(metavar="N", min=2, help="Frames from start to goal.")] = 32,
    steps: StepsOption = None,
    out: OutOption = None,
) -> None:
    """Decode the straight line between two states of held-out episodes, beside the real frames between them.

    Example: stamo eval interpolate runs/tokenizer_demo --span 48
    """
    from stamo_dist.evaluate.crew import Crew, run_crew
    from stamo_dist.evaluate.interpolate import interpolate as measure

    def body(crew: Crew) -> None:
        measure(
            run, checkpoint=checkpoint, episodes=episodes, points=points, start=start, span=span, steps=steps, out=out,
            crew=crew,
        )  # fmt: skip

    run_crew(run, nproc, context.obj, body, sys.argv[1:])


@app.command()
def probe(
    context: typer.Context,
    run: RunArgument,
    *,
    nproc: ProcessesOption = 1,
    checkpoint: CheckpointOption = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", metavar="N", min=1, help="Frames between the two; may be repeated. 1, 2, 4, 8 if omitted."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Heads of each kind, for the spread.")] = 3,
    episodes: Annotated[int, typer.Option(metavar="N", min=2, help="Most episodes of each split of a source.")] = 256,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Most epochs a head is trained.")] = 60,
    patch_dim: Annotated[int, typer.Option(metavar="N", min=1, help="Most numbers of patch tokens.")] = 4096,
    pixels: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Pixel difference: N × N cells; as many numbers as the state when omitted."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Frames encoded at once.")] = 64,
    out: OutOption = None,
) -> None:
    """Read the k actions between two frames from their motion: state against pixels, encoder and random weights.

    Started again after a kill it goes on; the features of the frames are kept for the next time.

    Example: stamo eval probe runs/tokenizer_demo --seeds 3
    """
    from stamo_dist.evaluate.crew import Crew, run_crew
    from stamo_dist.evaluate.probe import probe as measure

    def body(crew: Crew) -> None:
        measure(
            run, checkpoint=checkpoint, ks=sorted(set(k or (1, 2, 4, 8))), seeds=seeds, episodes=episodes,
            epochs=epochs, patch_dim=patch_dim, pixels=pixels, batch=batch, out=out, crew=crew,
        )  # fmt: skip

    run_crew(run, nproc, context.obj, body, sys.argv[1:])


@app.command()
def transfer(
    context: typer.Context,
    run: RunArgument,
    *,
    nproc: ProcessesOption = 1,
    checkpoint: CheckpointOption = None,
    pairs: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs of episodes, of each two sources.")] = 2,
    points: Annotated[int, typer.Option(metavar="N", min=2, help="Pictures of a motion, the first included.")] = 7,
    span: Annotated[int, typer.Option(metavar="N", min=1, help="Frames a motion lasts.")] = 32,
    steps: StepsOption = None,
    out: OutOption = None,
) -> None:
    """Add the motion of one held-out episode to the state of another scene and decode it.

    Example: stamo eval transfer runs/tokenizer_demo --span 48
    """
    from stamo_dist.evaluate.crew import Crew, run_crew
    from stamo_dist.evaluate.transfer import transfer as measure

    def body(crew: Crew) -> None:
        measure(run, checkpoint=checkpoint, pairs=pairs, points=points, span=span, steps=steps, out=out, crew=crew)

    run_crew(run, nproc, context.obj, body, sys.argv[1:])


@app.command()
def speed(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|RECIPE", help="A run folder; or a policy's recipe, timed with random weights."),
    ],
    *,
    checkpoint: CheckpointOption = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Frames at once; may be repeated. 1, 16 if omitted.")
    ] = None,
    calls: Annotated[int, typer.Option(metavar="N", min=2, help="Timed calls of each part.")] = 30,
    device: Annotated[
        list[str] | None, typer.Option(metavar="cpu|cuda", help="May be repeated; all there are if omitted.")
    ] = None,
    steps: StepsOption = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="A.B=C", help="Override one value of a recipe; may be repeated.")
    ] = [],  # noqa: B006 (typer reads the default)
    out: OutOption = None,
) -> None:
    """Frames a second through a tokenizer's encoder, to the state, and back; warm, median and spread.

    Of a policy: moments a second without a world head, with StaMo's, and with one for raw DINOv2 features.

    Example: stamo eval speed recipes/policy_openvla_motion.yaml --device cuda --set policy.weights=null
    """
    if run.is_file() or _is_policy(run):
        from stamo_dist.evaluate.policy_speed import policy_speed

        policy_speed(run, settings=set_, batches=batch or (1,), calls=calls, devices=device, out=out)
        return
    from stamo_dist.evaluate.speed import speed as measure

    measure(run, checkpoint=checkpoint, batches=batch or (1, 16), calls=calls, devices=device, steps=steps, out=out)


@app.command()
def actions(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A policy's run folder, or a folder or hub id with its weights.")
    ],
    *,
    shards: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Converted source on which released weights act; a run knows its own."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Whose episodes.")] = "val",
    cameras: CamerasOption = None,
    actions: ActionsOption = None,
    as_: AsOption = None,
    orientation: OrientationOption = None,
    crop: CropOption = None,
    views: ViewsOption = None,
    chunk: ChunkOption = None,
    bounds: BoundsOption = None,
    unnorm_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose statistics scale the actions; those called as the shards are."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="The StaMo tokenizer it sees through, where it moved.")
    ] = None,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out frames of each source.")] = 256,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Moments at once.")] = 16,
    out: OutOption = None,
) -> None:
    """How far a policy's chunks are from the actions of held-out episodes, beside the mean action.

    Example: stamo eval actions demo/runs/policy_rdt_1real_4video

    Example: stamo eval actions weights/openvla-7b-libero --as openvla-libero --shards shards/libero_goal --out goal
    """
    from stamo_dist.evaluate.actions import actions as measure
    from stamo_dist.models.openvla.framing import Use

    measure(
        policy, shards=shards, split=split, cameras=names(cameras or []), convention=actions,
        use=Use(as_, orientation, crop, views, chunk, bounds), unnorm_key=unnorm_key, tokenizer=tokenizer,
        frames=frames, batch=batch, out=out,
    )  # fmt: skip


def _is_policy(run: Path) -> bool:
    """Whether it is the folder of a run that trains a policy."""
    from stamo_dist.recipe.load import load
    from stamo_dist.run.folder import RunFolder

    resolved = RunFolder(run).resolved
    return resolved.is_file() and load(resolved).recipe.stage == "policy"
