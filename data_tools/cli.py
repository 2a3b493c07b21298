"""`stamo data …`: thin commands over this package; the heavy imports happen inside them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools import look_cli
from stamo_dist.command_options import with_options
from stamo_dist.errors import DataError
from stamo_dist.faults.ended import says_if_ended
from stamo_dist.words import counted

if TYPE_CHECKING:
    from data_tools.convert.driver import Settings
    from data_tools.convert.folder import ConversionOutcome

app = typer.Typer(no_args_is_help=True, help="Make, convert and look at data.")
look_cli.register(app)


def _split(values: list[str] | None) -> list[str]:
    """Options may be repeated or separated by commas."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


@app.command()
@says_if_ended("the episodes that were made are kept")
def simulate(
    benchmark: Annotated[str, typer.Argument(help="libero, metaworld or maniskill.")],
    out: Annotated[Path, typer.Argument(help="Folder for the HDF5 files.")],
    tasks: Annotated[
        list[str],
        typer.Option(
            help="LIBERO: SUITE/INDEX, SUITE/NAME or SUITE; Meta-World: reach-v3, …; ManiSkill: PickCube-v1, …. "
            "Repeat or separate by commas."
        ),
    ],
    episodes: Annotated[int, typer.Option(help="Successful episodes per task.")] = 50,
    size: Annotated[int, typer.Option(help="Side of the square frames in pixels.")] = 256,
    cameras: Annotated[
        list[str] | None,
        typer.Option(
            help="LIBERO: agentview, eye_in_hand, …; Meta-World: corner3, …; ManiSkill: base_camera, hand_camera."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Base seed; attempt k of a task is seeded by task, seed and k.")] = 0,
    processes: Annotated[
        int | None, typer.Option(help="Simulator processes; one per core, as memory allows, when omitted.")
    ] = None,
) -> None:
    """Run scripted experts in real simulators and keep the successful episodes, in LIBERO's or ManiSkill's HDF5 layout.

    Run it again after a kill and it continues; ask for more episodes and it adds them.

    Example: stamo data simulate libero raw/libero --tasks libero_spatial/2 --episodes 20 --size 128 --cameras agentview
    """
    from data_tools.simulators.simulate import Recording
    from data_tools.simulators.simulate import simulate as run

    recording = Recording(benchmark, size, _split(cameras), seed)
    result = run(recording, out, tasks=_split(tasks), episodes=episodes, processes=processes)
    typer.echo(str(result))
    for path in result.files:
        typer.echo(f"  {path}")


@dataclass(frozen=True)
class ConvertOptions:
    """Turn a dataset into streaming shards.

    Run it again after a kill and it continues; a finished OUT is left alone, or gets what SRC has gained since.

    Example: stamo data convert libero raw/libero shards/libero --size 64

    Example: stamo data convert rlds raw/bridge s3://bucket/bridge --rate 5 --split-by source

    Example: stamo data convert video raw/kitchen shards/kitchen --rate 10 --fit letterbox --set preset=epic

    Example: stamo data convert lerobot raw/so100 shards/so100 --num-slices 16 --slice $SLURM_ARRAY_TASK_ID
    """

    format: Annotated[str, typer.Argument(help="Format of SRC; `stamo data formats` lists them.")]
    src: Annotated[str, typer.Argument(help="File or folder to convert, or s3://… or hf://datasets/OWNER/NAME.")]
    out: Annotated[str, typer.Argument(help="Folder to create, or a URL such as s3://bucket/name.")]
    name: Annotated[str | None, typer.Option(help="Name of the source; OUT's last part when omitted.")] = None
    size: Annotated[int, typer.Option(help="Side of the square frames in pixels.")] = 256
    fit: Annotated[str, typer.Option(help="How other shapes become square: crop, letterbox or stretch.")] = "crop"
    quality: Annotated[int, typer.Option(help="JPEG quality.")] = 95
    rate: Annotated[
        float | None, typer.Option(metavar="HZ", help="Frames per second to keep, by time; all when omitted.")
    ] = None
    cameras: Annotated[list[str] | None, typer.Option(help="Cameras to convert; all when omitted.")] = None
    action: Annotated[
        str, typer.Option(help="What actions become: delta, absolute or original; the original is kept beside it.")
    ] = "delta"
    drop_noops: Annotated[
        bool, typer.Option("--drop-noops", help="Leave out steps without motion or a new gripper command.")
    ] = False
    val_fraction: Annotated[float, typer.Option(help="Share of the episodes held out as split val.")] = 0.05
    split_by: Annotated[str, typer.Option(help="hash (of the episode's name), or source: the dataset's own.")] = "hash"
    seed: Annotated[int, typer.Option(help="Chooses the held-out episodes.")] = 0
    max_episodes: Annotated[int | None, typer.Option(help="Take only the first ones, to try things out.")] = None
    episodes: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Take only those from number A up to B, from 0; B may be left out."),
    ] = None
    max_bad: Annotated[int, typer.Option(help="Give up when more episodes than this cannot be used.")] = 10
    instructions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Instructions by episode (columns episode,instruction), before the dataset's own."
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the format; may be repeated. See `formats`."),
    ] = None
    processes: Annotated[int | None, typer.Option(help="Converter processes; one per core when omitted.")] = None
    num_slices: Annotated[int, typer.Option(help="Number of runs that share the work, for a Slurm array.")] = 1
    slice: Annotated[int, typer.Option(help="Which of these runs this is, from 0.")] = 0
    slice_frames: Annotated[
        int, typer.Option(help="Frames that are converted as one unit, which a kill loses at most.")
    ] = 8192
    hash_: Annotated[
        bool,
        typer.Option(
            "--hash", help="Read all of SRC's files to tell whether they changed; their sizes and times when omitted."
        ),
    ] = False
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For a SRC or OUT that is a URL: where copies are; a cache when omitted."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT converted otherwise.")] = False

    def settings(self) -> Settings:
        """The options as conversion `Settings`; fields of the same name are copied.

        Raises:
            DataError: The format has no such option, or `episodes` is not a range.
        """
        from data_tools.convert.driver import Settings
        from data_tools.formats.registry import parse_options

        same = {field.name: getattr(self, field.name) for field in fields(Settings) if hasattr(self, field.name)}
        own = {"rate_hz": self.rate, "hash_files": self.hash_, "episodes": _range(self.episodes)}
        options = {**parse_options(self.format, self.set_ or []), "cameras": _split(self.cameras) or None}
        return Settings(**{**same, **own, "options": options})


@app.command()
@with_options(ConvertOptions)
@says_if_ended("what was converted is kept")
def convert(_: typer.Context, asked: ConvertOptions) -> None:
    from data_tools.convert.driver import run

    outcome = run(asked.format, asked.src, asked.out, asked.settings())
    if (manifest := outcome.manifest) is None:
        typer.echo(
            f"{asked.out}: slice {asked.slice} of {asked.num_slices} is done; still missing: {_few(outcome.missing)}"
        )
        typer.echo("  whichever run finds all slices there puts them together")
        return
    head = f"{asked.out}: {_what_was_done(outcome)}"
    splits = ", ".join(
        f"{k} {counted(v.episodes, 'episode')}, {counted(v.frames, 'frame')}" for k, v in manifest.splits.items()
    )
    typer.echo(f"{head}; {splits}; cameras {', '.join(manifest.cameras)}")
    typer.echo(f"  {manifest.rate_hz:g} Hz; action: {manifest.convention}")
    for note in manifest.notes:
        typer.echo(f"  {note}")
    if outcome.done and manifest.before and manifest.before[-1].stats:
        typer.echo(f"  the statistics are to be made anew: stamo data stats {asked.out}")
    if manifest.skipped:
        typer.echo(f"  {counted(len(manifest.skipped), 'episode')} skipped:")
    for reason in manifest.skipped:
        typer.echo(f"    {reason}")


@app.command()
def formats(format: Annotated[str | None, typer.Argument(help="Show the options of this format.")] = None) -> None:
    """List the formats that can be converted, or one format's options.

    Example: stamo data formats libero
    """
    from rich.console import Console
    from rich.table import Table

    from data_tools.formats.registry import FORMATS, options_of, type_text
    from stamo_dist.tables import Whole, show

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1 if format else 0, 0))
    if format is None:
        table.add_column("format")
        table.add_column("reads")
        for known, (_, reads) in FORMATS.items():
            table.add_row(known, reads)
    else:
        for heading in ("--set", "value", "default", "means"):
            table.add_column(heading)
        for option in options_of(format):
            default = "none" if option.default is None else str(option.default)
            table.add_row(option.name, type_text(option.type), default, option.doc)
    show(Console(), Whole(table))


def _what_was_done(outcome: ConversionOutcome) -> str:
    manifest = outcome.manifest
    if not outcome.done:
        return "already converted with these options"
    if manifest is None or not manifest.before:
        return "converted"
    before = manifest.as_of(len(manifest.before) - 1)
    return f"added {counted(manifest.episodes - before.episodes, 'episode')} to {before.episodes}"


def _range(text: str | None) -> tuple[int, int | None] | None:
    """The bounds of a range written A:B, A: or :B."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise DataError(f"episodes: {text!r} is no range of numbers; give A:B, e.g. 0:100")
    return int(match[1] or 0), int(match[2]) if match[2] else None


def _few(names: list[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
