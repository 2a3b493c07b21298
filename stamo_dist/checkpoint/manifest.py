"""`checkpoint.json`: the content of a checkpoint, and verifying it.

It is written last. A folder without it was never completed; one that does not match it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from stamo_dist.errors import CheckpointError
from stamo_dist.pretrained.checksums import hash_file
from stamo_dist.run.state import RunState

FORMAT_VERSION = 5
#: What files are compared with; up to format 3 it was SHA-256.
HASH = "xxh3_128"
_HASHES: dict[str, Any] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}
#: Field names of format 2 → today's names.
_RENAMED = {"identity": "recipe", "generation": "lease"}
MANIFEST = "checkpoint.json"


class ForeignFormatError(CheckpointError):
    """A complete checkpoint that only another version of this package can read."""


class UnfinishedError(CheckpointError):
    """A folder without a manifest: it was never completed."""


@dataclass(frozen=True)
class Stored:
    """One file of a checkpoint, as it was written."""

    bytes: int
    digest: str  # the hash's name, a colon and its hex digits


@dataclass
class CheckpointManifest:
    """checkpoint.json."""

    state: RunState
    strategy: str
    world_size: int
    precision: str
    fingerprint: str  # of the mixture
    files: dict[str, Stored]  # relative path → size and digest
    recipe: dict[str, Any] = field(default_factory=dict)  # recipe field → its value, for naming changes
    kind: str = "regular"  # regular | temporary (ephemeral_every, or saved on leaving)
    averaged: bool = False  # it holds the moving average
    lease: int = 0  # which start of the run wrote it
    git_commit: str | None = None
    sources: dict[str, str] = field(default_factory=dict)  # recipe field → location of its weights
    format_version: int = FORMAT_VERSION

    @property
    def holds_all(self) -> bool:
        """Whether it has every parameter, those that are not trained included: up to format 4 ZeRO's may not."""
        return self.format_version > 4 or not self.strategy.startswith("zero")

    def text(self) -> str:
        """The file's content: JSON with its own checksum."""
        content = json.loads(json.dumps(asdict(self)))  # as JSON returns it: keys are strings
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder and manifest."""

    path: Path
    manifest: CheckpointManifest


def read_checkpoint_manifest(path: Path) -> CheckpointManifest:
    """Read the manifest of a checkpoint and compare the files' names and sizes; `damage` compares contents.

    Raises:
        UnfinishedError: It has no manifest.
        ForeignFormatError: It has another format.
        CheckpointError: The manifest is damaged, or files are missing or of another size.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError:
        raise UnfinishedError(f"{path}: no {MANIFEST}, so it is no checkpoint or was never completed") from None
    manifest = parsed(content, path)
    sizes = {name: _size(path / name) for name in manifest.files}
    missing = [name for name, size in sizes.items() if size is None]
    resized = [name for name, size in sizes.items() if size not in (None, manifest.files[name].bytes)]
    if missing or resized:
        raise CheckpointError(f"{path}: {_listed(('missing', missing), ('truncated', resized))}")
    return manifest


def parsed(content: bytes, path: Path | str) -> CheckpointManifest:
    """Parse the content of a manifest; `path`: of the checkpoint, for errors.

    Raises:
        ForeignFormatError: It has another format.
        CheckpointError: It is damaged, or names files that are not within the checkpoint.
    """
    try:
        raw = json.loads(content)
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: {MANIFEST} is damaged") from None
    checksum = raw.pop("sha256", None)  # the same in every format from 2 on
    if version != 1 and checksum != _digest(raw):
        raise CheckpointError(f"{path}: {MANIFEST} is damaged")
    if version not in range(2, FORMAT_VERSION + 1):
        raise ForeignFormatError(
            f"{path}: checkpoint format {version}; this version of stamo reads 2 to {FORMAT_VERSION}; "
            "use the version that wrote it, or choose another run_dir"
        )
    if version == 2:
        raw = {_RENAMED.get(name, name): value for name, value in raw.items()}
    files = {
        name: Stored(stored["bytes"], stored["digest"] if version > 3 else f"sha256:{stored['sha256']}")
        for name, stored in raw["files"].items()
    }
    if outside := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
        raise CheckpointError(f"{path}: {MANIFEST} names {outside[0]}, which is not within it")
    if version < 5:
        raw["averaged"] = any(name.startswith("ema/") for name in files)
    return CheckpointManifest(**{**raw, "state": RunState(**raw["state"]), "files": files})


def damage(path: Path, manifest: CheckpointManifest, share: int = 0, shares: int = 1) -> list[str]:
    """Names of files of the checkpoint with wrong content; checks one of `shares` equal shares."""
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))[share::shares]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        same = list(pool.map(lambda name: has_digest(path / name, manifest.files[name]), names))
    return [name for name, unchanged in zip(names, same, strict=True) if not unchanged]


def damaged(path: Path, names: Sequence[str]) -> CheckpointError:
    """The error about files that `damage` found."""
    return CheckpointError(f"{path}: {_listed(('changed since it was written', sorted(names)))}")


def _listed(*groups: tuple[str, Sequence[str]]) -> str:
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in groups if names)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    """Bytes of a file; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def hasher(digest: str) -> Any:
    """A new hash object of a stored digest's algorithm: `update(bytes)`, `hexdigest()`."""
    return _HASHES[digest.partition(":")[0]]()


def has_digest(path: Path, stored: Stored) -> bool:
    """Whether a file exists and has the stored digest."""
    try:
        return hash_file(path, hasher(stored.digest)) == stored.digest.partition(":")[2]
    except OSError:
        return False
