"""The options of every measurement: each field is an option of its command, with default, help and limits.

The measurements (`reconstruct.py` and so on) derive from these classes. Nothing here imports torch, so that
`stamo eval --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stamo_dist.run.registry import run_names
from stamo_dist.shipped import page

if TYPE_CHECKING:
    from stamo_dist.models.openvla.framing import Use


def count(help: str, least: int = 1) -> Any:
    """An integer option, at least `least`."""
    return typer.Option(metavar="N", min=least, help=help)


def named(metavar: str, help: str, *flags: str) -> Any:
    """An option shown as --NAME METAVAR; `flags`: its names if they differ from the parameter's."""
    return typer.Option(*flags, metavar=metavar, help=help)


def split(values: list[str]) -> list[str]:
    """Options may be repeated or separated by commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run folder (the recipe's run_dir), or the name of a run.", autocompletion=run_names
    ),
]
CheckpointOption = Annotated[str | None, named("STEP|best|PATH", "Which one; the newest whole one when omitted.")]
StepsOption = Annotated[int | None, count("Sampler steps; flow.sampler_steps when omitted.")]
OutOption = Annotated[Path | None, named("DIR", "Where to write; RUN/eval/NAME when omitted.")]


@dataclass
class RunOptions:
    """Options of a measurement of a run's tokenizer."""

    run: RunArgument
    checkpoint: CheckpointOption = None
    out: OutOption = None


@dataclass
class SharedOptions(RunOptions):
    """Options of a measurement that several processes can share."""

    nproc: Annotated[int, count("Processes that measure together.")] = 1


@dataclass
class ReconstructOptions(SharedOptions):
    """PSNR and SSIM of reconstructed held-out frames, beside the VAE alone and the mean image.

    Example: stamo eval reconstruct demo/runs/tokenizer --frames 64
    """

    frames: Annotated[int, count("Most held-out frames of each source.")] = 128
    steps: StepsOption = None
    batch: Annotated[int, count("Frames decoded at once.")] = 32


@dataclass
class InterpolateOptions(SharedOptions):
    """Decode the straight line between two states of held-out episodes, beside the real frames between them.

    Example: stamo eval interpolate demo/runs/tokenizer --span 48
    """

    episodes: Annotated[int, count("Most held-out episodes of each source.")] = 4
    points: Annotated[int, count("Pictures on the line, ends included.", least=3)] = 9
    start: Annotated[int, typer.Option(metavar="T", min=0, help="Frame of the start state.")] = 0
    span: Annotated[int, count("Frames from start to goal.", least=2)] = 32
    steps: StepsOption = None


@dataclass
class TransferOptions(SharedOptions):
    """Add the motion of one held-out episode to the state of another scene and decode it.

    Example: stamo eval transfer demo/runs/tokenizer --span 48
    """

    pairs: Annotated[int, count("Pairs of episodes, of each two sources.")] = 2
    points: Annotated[int, count("Pictures of a motion, the first included.", least=2)] = 7
    span: Annotated[int, count("Frames a motion lasts.")] = 32
    steps: StepsOption = None


@dataclass
class ProbeOptions(SharedOptions):
    """Read the k actions between two frames from their motion: state against pixels, encoder and random weights.

    A killed measurement continues when it is started again; the features of the frames are kept for the next time.

    Example: stamo eval probe demo/runs/tokenizer --seeds 3
    """

    k: Annotated[list[int] | None, count("Frames between the two; may be repeated. 1, 2, 4, 8 if omitted.")] = None
    seeds: Annotated[int, count("Heads of each kind, for the spread.")] = 3
    episodes: Annotated[int, count("Most episodes of each split of a source.", least=2)] = 256
    epochs: Annotated[int, count("Most epochs a head is trained.")] = 60
    patch_dim: Annotated[int, count("Most numbers of patch tokens.")] = 4096
    pixels: Annotated[
        int | None, count("Pixel difference: N × N cells; as many numbers as the state when omitted.")
    ] = None
    batch: Annotated[int, count("Frames encoded at once.")] = 64


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
    batch: Annotated[list[int] | None, count("Frames at once; may be repeated. 1, 16 if omitted.")] = None
    calls: Annotated[int, count("Timed calls of each part.", least=2)] = 30
    device: Annotated[list[str] | None, named("cpu|cuda", "May be repeated; all there are if omitted.")] = None
    steps: StepsOption = None
    set_: Annotated[list[str] | None, named("A.B=C", "Override one value of a recipe; may be repeated.", "--set")] = (
        None
    )


TasksOption = Annotated[
    list[str],
    typer.Option(
        help="LIBERO: SUITE, SUITE/INDEX or SUITE/NAME; Meta-World: reach-v3, …; ManiSkill: PickCube-v1, …. "
        "Repeat or separate by commas."
    ),
]
SimulatorsOption = Annotated[int | None, count("Simulators at once; as cores and memory allow when omitted.")]
StepLimit = Annotated[int | None, count("Steps of a trial; the benchmark's when omitted.")]
PolicyArgument = Annotated[
    str,
    typer.Argument(
        metavar="POLICY",
        help="A policy's run, its folder or name, or a folder or hub id with its weights.",
        autocompletion=run_names,
    ),
]
TokenizerOption = Annotated[str | None, named("PATH", "The StaMo tokenizer it sees through, where it moved.")]


@dataclass(kw_only=True)
class PlanOptions(RunOptions):
    """Let the probe's head drive a simulated robot from (now, goal image), beside the same head on other motions.

    A killed measurement continues when it is started again; with more --trials it adds them.

    Example: stamo eval plan demo/runs/tokenizer --tasks libero_spatial/2 --trials 20
    """

    tasks: TasksOption
    benchmark: Annotated[str | None, named("libero|metaworld|maniskill", "The format of the source when omitted.")] = (
        None
    )
    source: Annotated[
        list[str] | None, named("NAME", "Where the head learns; all sources of the benchmark if omitted.")
    ] = None
    trials: Annotated[int, count("Trials of each task and agent.")] = 20
    k: Annotated[int, count("Actions between two looks.")] = 4
    epochs: Annotated[int, count("Most epochs a head is trained.")] = 60
    max_steps: StepLimit = None
    processes: SimulatorsOption = None
    videos: Annotated[int, count("Most videos shown of each task.", least=0)] = 1
    seed: Annotated[int, named("N", "Of the heads and the random agent.")] = 0


AsOption = Annotated[
    str | None,
    named(
        "PRESET",
        "Run a released policy as its authors do: openvla-libero, oft-libero, openvla-bridge or oft-aloha.",
        "--as",
    ),
]
OrientationOption = Annotated[
    str | None,
    named(
        "upright|mirrored|flipped_vertically|rotated_180",
        "How it sees an upright frame; as its folder or --as says when omitted.",
    ),
]
CropOption = Annotated[
    float | None, named("SHARE", "Of the frame's area, the centre that it sees; 1 is all. As --orientation.")
]
ViewsOption = Annotated[int | None, count("Cameras it looks at; as its folder or --as says when omitted.")]
ChunkOption = Annotated[int | None, count("Actions it predicts at once; as its folder or --as says.")]
BoundsOption = Annotated[str | None, named("q99|minmax", "What -1 and 1 stand for; as its folder or --as says.")]
CamerasOption = Annotated[
    list[str] | None, named("NAME", "What it sees, in the order of its views; as trained when omitted.")
]
ActionsOption = Annotated[
    str | None,
    named(
        "delta|original|openvla",
        f"What its numbers mean, see {page('evaluate.md')}; delta, or as the preset says, when omitted.",
    ),
]


@dataclass(kw_only=True)
class UseOptions:
    """What the user states about a policy that was not trained here; see `stamo_dist.models.openvla.framing.Use`."""

    as_: AsOption = None
    orientation: OrientationOption = None
    crop: CropOption = None
    views: ViewsOption = None
    chunk: ChunkOption = None
    bounds: BoundsOption = None

    def use(self) -> Use:
        """Raises: RunError: Unknown preset or orientation, or invalid share or bounds."""
        from stamo_dist.models.openvla.framing import Use

        return Use(self.as_, self.orientation, self.crop, self.views, self.chunk, self.bounds)


@dataclass(kw_only=True)
class ActionsOptions(UseOptions):
    """How far a policy's chunks are from the actions of held-out episodes, beside the mean action.

    Example: stamo eval actions demo/runs/policy_rdt_1real_4video

    Example: stamo eval actions weights/openvla-7b-libero --as openvla-libero --shards shards/libero_goal --out goal
    """

    policy: PolicyArgument = field(kw_only=False)
    shards: Annotated[
        str | None, named("SHARDS", "Converted source on which released weights act; a run knows its own.")
    ] = None
    split: Annotated[str, named("NAME", "Whose episodes.")] = "val"
    cameras: CamerasOption = None
    actions: ActionsOption = None
    unnorm_key: Annotated[
        str | None, named("NAME", "Whose statistics scale the actions; those called as the shards are.")
    ] = None
    tokenizer: TokenizerOption = None
    frames: Annotated[int, count("Most held-out frames of each source.")] = 256
    batch: Annotated[int, count("Moments at once.")] = 16
    out: OutOption = None


@dataclass(kw_only=True)
class ShowOptions:
    """How a policy sees a benchmark; as in its training when omitted."""

    benchmark: Annotated[
        str | None, named("libero|metaworld|maniskill", "Which simulator; that of the training data when omitted.")
    ] = None
    cameras: CamerasOption = None
    size: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=16, help="Side of the frames; as trained when omitted.")
    ] = None
    actions: ActionsOption = None
    unnorm_key: Annotated[
        str | None, named("NAME", "Source whose statistics scale the actions; the benchmark's or suite's own.")
    ] = None


@dataclass(kw_only=True)
class RolloutOptions(UseOptions, ShowOptions):
    """Success rate of a policy in closed loop, from the benchmark's initial states and by its own success check.

    A killed measurement continues when it is started again; the slice that ends last writes the full table.

    Example: stamo eval rollout runs/policy_openvla_state --tasks libero_spatial --trials 20

    Example: stamo eval rollout runs/my_policy --tasks libero_10 --num-slices 8 --slice $SLURM_ARRAY_TASK_ID

    Example: stamo eval rollout weights/openvla-oft-libero-spatial --as oft-libero --tasks libero_spatial --out oft
    """

    policy: PolicyArgument = field(kw_only=False)
    tasks: TasksOption
    trials: Annotated[int, count("Trials of each task.")] = 20
    act_steps: Annotated[int | None, count("Actions taken of a chunk; all when omitted.")] = None
    max_steps: StepLimit = None
    checkpoint: Annotated[str | None, named("STEP|best|PATH", "Of a run, in place of its export.")] = None
    tokenizer: TokenizerOption = None
    device: Annotated[str | None, named("cpu|cuda", "Where it runs; the GPU where there is one.")] = None
    processes: SimulatorsOption = None
    videos: Annotated[int, count("Videos kept of each task's successes, and of its failures.", least=0)] = 1
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Random actions and the benchmark's expert in the same trials, too.")
    ] = False
    shuffle_instructions: Annotated[
        bool, typer.Option("--shuffle-instructions", help="Tell every task what the next one is to do.")
    ] = False
    num_slices: Annotated[int, typer.Option(min=1, help="Runs that share the trials, for a Slurm array.")] = 1
    slice: Annotated[int, typer.Option(help="Which of these runs this is, from 0.")] = 0
    out: OutOption = None
