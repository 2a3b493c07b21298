"""`stamo sync`."""

from __future__ import annotations

from typing import Annotated

import typer

from stamo_dist.faults.ended import says_if_ended


@says_if_ended("what was copied is kept")
def sync(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="RUN/checkpoints/step_…, s3://BUCKET/…/step_…, or a run folder: its newest checkpoint."
        ),
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder or s3://BUCKET/PREFIX that holds checkpoints.")],
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Files copied at once.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Copy a checkpoint between folders and S3. Every file is compared with its checksum; the manifest comes last.

    Run it again after a kill and it continues, within large files too. S3_ENDPOINT_URL names an endpoint other than
    AWS'. `stamo data sync` copies shards.

    Example: stamo sync runs/my_run s3://bucket/my_run
    """
    from data_tools.stores.checkpoints import copy_checkpoint

    typer.echo(f"{dst}: {copy_checkpoint(src, dst, parallel=parallel, quiet=quiet)}")
