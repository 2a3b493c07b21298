"""`stamo sync`: copy a checkpoint between folders and buckets, each file checked, the manifest last."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_tools.stores.open import open_store
from data_tools.stores.progress import bytes_bar
from data_tools.stores.s3 import S3Store
from data_tools.stores.store import Advance, DamagedError, LocalStore, Store
from data_tools.stores.sync import Copied, put_bytes
from stamo_dist.checkpoint.manifest import MANIFEST, Stored, has_digest, parsed, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, sync, sync_tree
from stamo_dist.errors import CheckpointError, DataError
from stamo_dist.run.folder import RunFolder

_NAME = re.compile(r"step_\d+")


def copy_checkpoint(src: str, dst: str, *, parallel: int = 4, quiet: bool = False, pause: float = 1.0) -> Copied:
    """Copy a checkpoint to DST/step_…, which is valid only once all of it is there (the manifest is last).

    Run it again after a kill and it continues: files that are there, and parts of large ones, are not sent again.

    Args:
        src: Folder or s3://BUCKET/PREFIX of a checkpoint; of a run's folder, its newest complete one.
        dst: Folder or URL that holds checkpoints; one of SRC and DST is a folder.
        parallel: Files copied at once; each takes 32 MB of memory.
        quiet: No progress bar.
        pause: Seconds before a failing request is made again; each further pause doubles.

    Raises:
        CheckpointError: SRC is not a complete checkpoint, or a file is damaged.
        DataError: DST holds another checkpoint of that name, or a file cannot be read or written.
    """
    source = open_store(src, pause)
    if source.local is not None:
        folder = _checkpoint(source.local)
        read_checkpoint_manifest(folder)
        source = LocalStore(folder)
    name = source.url.rstrip("/").rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{src}: no checkpoint, whose folder is called step_…, and no run")
    target = open_store(f"{dst.rstrip('/')}/{name}", pause)
    if source.local is None and target.local is None:
        raise DataError(f"{src}, {dst}: one of them must be a folder; copy it there first")
    if source.local is None and source.stat(MANIFEST) is None:
        raise CheckpointError(f"{source.url}: no {MANIFEST}, so it is no checkpoint or was never completed")
    text = source.read(MANIFEST)
    files = parsed(text, source.url).files
    if target.stat(MANIFEST) is not None:
        if target.read(MANIFEST) != text:
            raise DataError(f"{target.url}: holds another checkpoint; choose another DST, or remove it")
        return Copied(skipped=len(files) + 1)
    copy: Callable[[str, Stored, Advance], bool]
    if isinstance(target, S3Store) and source.local is not None:
        part, copy = None, partial(_upload, source.local, target)
    else:
        assert target.local is not None, "there are no other stores"
        part = target.local.with_name(f".{name}.sync.tmp")
        copy = partial(_fetch, source, part)
    with (
        bytes_bar("sync", sum(file.bytes for file in files.values()), quiet) as advance,
        ThreadPoolExecutor(parallel) as pool,
    ):
        sent = list(pool.map(lambda name: copy(name, files[name], advance), files))
    moved = [stored.bytes for stored, was_sent in zip(files.values(), sent, strict=True) if was_sent]
    put_bytes(LocalStore(part) if part else target, MANIFEST, text)
    if part is not None and target.local is not None:
        _finish(part, target.local)
    return Copied(len(moved) + 1, sum(moved) + len(text), len(files) - len(moved))


def _checkpoint(folder: Path) -> Path:
    """The folder of a checkpoint; of a run, its newest complete one."""
    checkpoints = RunFolder(folder).checkpoints
    if (folder / MANIFEST).exists() or not checkpoints.is_dir():
        return folder
    whole, problems = complete(checkpoints)
    if not whole:
        raise CheckpointError("\n  ".join([f"{folder}: the run holds no whole checkpoint", *problems]))
    return whole[0]


def _upload(folder: Path, target: S3Store, name: str, stored: Stored, advance: Advance) -> bool:
    """Whether anything had to be sent."""
    there = target.stat(name)
    if there is not None and (there.size, there.digest) == (stored.bytes, stored.digest):
        advance(stored.bytes)
        return False
    target.put_in_parts(folder / name, name, stored.digest, advance)
    return True


def _fetch(source: Store, part: Path, name: str, stored: Stored, advance: Advance) -> bool:
    """Whether it had to be fetched."""
    path = part / name
    if has_digest(path, stored):
        advance(stored.bytes)
        return False
    source.fetch(name, path, advance)
    if not has_digest(path, stored):
        raise DamagedError(f"{source.url}/{name}: is not what was written")
    return True


def _finish(part: Path, target: Path) -> None:
    try:
        sync_tree(part)
        part.rename(target)
        sync(target.parent)
    except OSError as e:
        raise DataError(f"{target}: cannot be written: {e.strerror or e}") from e
