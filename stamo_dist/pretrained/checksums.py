"""Checksums of an exported model's weight files: one line a file, as `xxh128sum --check` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from stamo_dist.errors import CheckpointError

CHECKSUMS = "weights.xxh128"
_WEIGHTS = (".safetensors", ".pt")
_BLOCK = 1 << 20


def write(folder: Path) -> None:
    """Write `weights.xxh128` about the weight files in an exported model's folder and below it."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in _weight_files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, field: str) -> None:
    """Compare the weight files with `weights.xxh128`, which early exports and other programs' models lack.

    Raises:
        CheckpointError: One of them is missing, has changed or is not listed, or the list cannot be read; it begins
            with `field`.
    """
    listed = folder / CHECKSUMS
    try:
        lines = [line.split("  ", 1) for line in listed.read_text(encoding="utf-8").splitlines()]
        expected = {name: digest for digest, name in lines}
    except FileNotFoundError:
        return
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{field}: {listed} cannot be read ({e}); export or copy the model again") from None
    if unlisted := [name for name in _weight_files(folder) if name not in expected]:
        raise CheckpointError(
            f"{field}: {listed} does not have {', '.join(unlisted)}: the list is cut off, or the file is not of the "
            "export; export or copy the model again, or take the file away"
        )
    if changed := [name for name, digest in expected.items() if not _has(folder / name, digest)]:
        raise CheckpointError(
            f"{field}: {folder}: changed since it was exported: {', '.join(changed)}; export or copy it again"
        )


def _weight_files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in _WEIGHTS)


def hash_file(path: Path, digest: Any) -> str:
    """The hex digits that a new hash object of hashlib or xxhash gives of a file's content.

    Raises:
        OSError: It cannot be read.
    """
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return str(digest.hexdigest())


def _has(path: Path, digest: str) -> bool:
    try:
        return _digest(path) == digest
    except FileNotFoundError:
        return False


def _digest(path: Path) -> str:
    return hash_file(path, xxhash.xxh3_128())
