"""`stamo data …`: thin commands over this package; the heavy imports happen inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make, convert and look at data.")


def _split(values: list[str] | None) -> list[str]:
    """Options may be repeated or separated by commas."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


@app.command()
def simulate(
    benchmark: Annotated[str, typer.Argument(help="libero or metaworld.")],
    out: Annotated[Path, typer.Argument(help="Folder for the HDF5 files.")],
    tasks: Annotated[
        list[str],
        typer.Option(
            help="LIBERO: SUITE/INDEX, SUITE/NAME or SUITE; Meta-World: reach-v3, …. Repeat or separate by commas."
        ),
    ],
    episodes: Annotated[int, typer.Option(help="Successful episodes per task.")] = 50,
    size: Annotated[int, typer.Option(help="Side of the square frames in pixels.")] = 256,
    cameras: Annotated[
        list[str] | None,
        typer.Option(help="LIBERO: agentview, eye_in_hand, …; Meta-World: corner3, topview, …."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Base seed; attempt k of a task is seeded by task, seed and k.")] = 0,
    processes: Annotated[
        int | None, typer.Option(help="Simulator processes; one per core, as memory allows, when omitted.")
    ] = None,
) -> None:
    """Run scripted experts in real simulators and keep the successful episodes, in LIBERO's HDF5 layout.

    Run it again after a kill and it continues; ask for more episodes and it adds them.

    Example: stamo data simulate libero raw/libero --tasks libero_spatial/2 --episodes 20 --size 128 --cameras agentview
    """
    from data_tools.simulate import simulate as run

    result = run(
        benchmark,
        out,
        tasks=_split(tasks),
        episodes=episodes,
        size=size,
        cameras=_split(cameras) or None,
        seed=seed,
        processes=processes,
    )
    typer.echo(str(result))
    for path in result.files:
        typer.echo(f"  {path}")


@app.command()
def convert(
    format: Annotated[str, typer.Argument(help="Format of SRC: libero.")],
    src: Annotated[Path, typer.Argument(help="File or folder to convert.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    name: Annotated[str | None, typer.Option(help="Name of the source; OUT's folder name when omitted.")] = None,
    size: Annotated[int, typer.Option(help="Side of the square frames in pixels.")] = 256,
    cameras: Annotated[list[str] | None, typer.Option(help="Cameras to convert; all when omitted.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the episodes held out as split val.")] = 0.05,
    quality: Annotated[int, typer.Option(help="JPEG quality.")] = 95,
    seed: Annotated[int, typer.Option(help="Chooses the held-out episodes.")] = 0,
    max_bad: Annotated[int, typer.Option(help="Give up when more episodes than this cannot be read.")] = 10,
    image_timing: Annotated[
        str | None, typer.Option(help="For files that do not say: images were taken before or after their action.")
    ] = None,
    image_orientation: Annotated[
        str | None, typer.Option(help="For files that do not say: upright, flipped_vertically or rotated_180.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Converter processes; one per core when omitted.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that was converted otherwise.")] = False,
) -> None:
    """Turn a dataset into streaming shards.

    Run it again after a kill and it continues; a finished OUT is left alone.

    Example: stamo data convert libero raw/libero shards/libero --size 64
    """
    from data_tools.driver import convert as run

    manifest, done = run(
        format,
        src,
        out,
        name=name,
        size=size,
        val_fraction=val_fraction,
        quality=quality,
        seed=seed,
        max_bad=max_bad,
        overwrite=overwrite,
        processes=processes,
        options={
            "cameras": _split(cameras) or None,
            "image_timing": image_timing,
            "image_orientation": image_orientation,
        },
    )
    head = f"{out}: {'converted' if done else 'already converted with these options'}"
    splits = ", ".join(f"{k} {v.episodes} episodes, {v.frames} frames" for k, v in manifest.splits.items())
    typer.echo(f"{head}; {splits}; cameras {', '.join(manifest.cameras)}")
    for reason in manifest.skipped:
        typer.echo(f"  skipped {reason}")
