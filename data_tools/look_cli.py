"""`stamo data check | preview | stats | sync | export`: look at converted sources, copy and export them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.faults.ended import says_if_ended
from stamo_dist.words import counted

SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// URL of a converted source.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes; one a core on large sources when omitted.")]


@says_if_ended("what was verified is kept")
def check(
    source: SourceArgument,
    split: Annotated[str | None, typer.Option(help="Only this split; all when omitted.")] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Look at a sample: three frames of every episode, the checksum of one shard in ten."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="Also compare with the dataset it was converted from."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With --against: an option of SRC's format; may be repeated."),
    ] = None,
    processes: Processes = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all findings there.")] = None,
    quiet: Quiet = False,
) -> None:
    """Verify a source: checksums, frames, episodes, times, actions. Exit code 1 if there are errors.

    Shards that were verified before and have not changed are not decoded again.

    Example: stamo data check shards/libero --fast

    Example: stamo data check shards/libero --against raw/libero
    """
    from data_tools.look.check import check as run
    from data_tools.look.check_report import print_report, write_report

    if set_ and against is None:
        raise typer.BadParameter("--set is for the dataset of --against SRC")
    report = run(source, split=split, fast=fast, against=against, set=set_ or (), processes=processes, quiet=quiet)
    if json:
        write_report(report, json)
    print_report(report)
    if not report.fine:
        raise typer.Exit(1)


def preview(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Folders or URLs, a picture each.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="PNG, or a folder, also for several; here when omitted.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, or else the first, when omitted.")] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Episodes, evenly spread over the split; a page full when omitted.")
    ] = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames in a film strip, evenly spaced in time.")] = 8,
) -> None:
    """Draw a contact sheet, and film strips with the actions below: is a camera mirrored or upside down?

    Example: stamo data preview shards/libero shards/metaworld --out pictures
    """
    from data_tools.look.preview import preview as run

    if len(sources) > 1 and out is not None and out.suffix and not out.is_dir():
        raise typer.BadParameter(f"{out} is one file, but there are {len(sources)} sources; give a folder")
    for number, source in enumerate(sources):
        with says_if_ended("pictures that were drawn are kept" if number else ""):
            typer.echo(str(run(source, out, split=split, episodes=episodes, frames=frames)))


@says_if_ended("")
def stats(
    source: SourceArgument,
    split: Annotated[str, typer.Option(help="Only those of train are kept in the manifest.")] = "train",
    processes: Processes = None,
    quiet: Quiet = False,
) -> None:
    """Print mean, std, min, max, q01 and q99 of actions and proprio, and keep them in the manifest.

    Example: stamo data stats shards/libero
    """
    from data_tools.look.stats import TRAIN, keep_stats, print_stats, source_stats
    from data_tools.stores.open import open_store
    from data_tools.stores.sync import fetch_manifest

    found = source_stats(source, split, processes=processes, quiet=quiet)
    manifest, _ = fetch_manifest(open_store(source))
    if not found:
        typer.echo(f"{source}: has neither actions nor proprio")
        return
    print_stats(manifest, split, found)
    if split == TRAIN:
        keep_stats(source, found)
        typer.echo(f"kept in the manifest of {source}")
    else:
        typer.echo("not kept: the manifest has the statistics of split train only")


@says_if_ended("what was copied is kept")
def sync(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or s3://BUCKET/PREFIX of a converted source.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL to create or to complete.")],
    parallel: Annotated[int, typer.Option("--processes", "--parallel", min=1, help="Files copied at once.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another source that DST holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """Copy a source between folders and S3. Every shard is compared with its sha256, and the manifest comes last.

    Run it again after a kill and it continues. S3_ENDPOINT_URL names an endpoint other than AWS'.

    Example: stamo data sync shards/libero s3://bucket/shards/libero
    """
    from data_tools.stores.sync import sync as run

    typer.echo(f"{dst}: {run(src, dst, parallel=parallel, overwrite=overwrite, quiet=quiet)}")


@says_if_ended("")
def export(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="lerobot: a LeRobotDataset v3.0.")],
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it must not exist.")],
    quiet: Quiet = False,
) -> None:
    """Write a converted source for another library; DIR appears when it is whole.

    lerobot: frames as h264 videos, numbers and instructions in parquet, with the names of episodes and the splits;
    `stamo data convert lerobot` reads it back.

    Example: stamo data export lerobot shards/libero lerobot/libero
    """
    from data_tools.export.lerobot import export_lerobot
    from stamo_dist.errors import DataError

    if format != "lerobot":
        raise DataError(f"{format}: only lerobot is written")
    done = export_lerobot(source, out, quiet=quiet)
    typer.echo(f"{out}: {counted(done.episodes, 'episode')}, {counted(done.frames, 'frame')}")
    for note in done.notes:
        typer.echo(f"  {note}")


def register(app: typer.Typer) -> None:
    """Add the commands to `stamo data`."""
    for command in (check, preview, stats, sync, export):
        app.command()(command)
