"""Stores of a source's files: a local folder or s3://BUCKET/PREFIX."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stamo_dist.errors import DataError

Advance = Callable[[int], None]  # takes the bytes moved since the last call
CHUNK = 1 << 20


@dataclass(frozen=True)
class Stat:
    """Facts about a file that are known without reading it."""

    size: int
    stamp: str  # a value that changes whenever the file is written
    sha256: str = ""  # where the store keeps it
    md5: str = ""  # if the store knows it
    digest: str = ""  # if the store keeps it: the hash's name, a colon and its hex digits


class DamagedError(DataError):
    """A file's content does not match its checksum."""


class TransientError(DataError):
    """A request failed with an error that may pass on retry."""


class Store(Protocol):
    """Files by name, such as "train/front/index.json". All methods raise DataError with advice."""

    url: str
    local: Path | None  # the folder of a local store, else None

    def stat(self, name: str) -> Stat | None:
        """None if there is no such file."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name, sorted, without hidden files and unfinished copies."""

    def read(self, name: str) -> bytes: ...

    def fetch(self, name: str, path: Path, advance: Advance) -> None:
        """Copy a file to `path`."""

    def put(self, path: Path, name: str, sha256: str, advance: Advance) -> None:
        """Copy `path` to a file; readers see either the complete file or none."""

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""


def sha256_of(path: Path, advance: Advance | None = None) -> str:
    """sha256 of a file's content.

    Raises:
        DataError: It cannot be read.
    """
    return _digest(path, "sha256", advance)


def md5_of(path: Path) -> str:
    """MD5 of a file's content, which equals S3's ETag of a file uploaded in one request."""
    return _digest(path, "md5", None)


def _digest(path: Path, algorithm: str, advance: Advance | None) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                if advance:
                    advance(len(chunk))
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    return digest.hexdigest()


@contextmanager
def at_hand(store: Store, name: str) -> Iterator[Path]:
    """A local path of the file: the file itself, or a temporary copy."""
    if store.local is not None:
        yield store.local / name
        return
    with tempfile.TemporaryDirectory(prefix="stamo-") as folder:
        path = Path(folder) / name.rsplit("/", 1)[-1]
        store.fetch(name, path, lambda _: None)
        yield path


def is_ours(name: str) -> bool:
    """Whether a file belongs to a source: inside it, not hidden, not a lock, not a partial file."""
    return all(part and not part.startswith(".") and not part.endswith((".tmp", ".lock")) for part in name.split("/"))


def part_of(path: Path) -> Path:
    """The temporary path of a file that is being written."""
    return path.with_name(f".{path.name}.part")


class LocalStore:
    """Files of a folder."""

    def __init__(self, folder: Path):
        self.url = str(folder)
        self.local: Path | None = folder
        self._folder = folder

    def stat(self, name: str) -> Stat | None:
        try:
            stat = (self._folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise DataError(f"{self._folder / name}: cannot be read: {e.strerror or e}") from e
        return Stat(stat.st_size, str(stat.st_mtime_ns))

    def sizes(self) -> dict[str, int]:
        found = (Path(folder) / file for folder, _, files in os.walk(self._folder) for file in files)
        named = {path.relative_to(self._folder).as_posix(): path for path in found}
        return {name: named[name].stat().st_size for name in sorted(named) if is_ours(name)}

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self._folder / name}: missing") from None
        except OSError as e:
            raise DataError(f"{self._folder / name}: cannot be read: {e.strerror or e}") from e

    def fetch(self, name: str, path: Path, advance: Advance) -> None:
        _copy(self._folder / name, path, advance)

    def put(self, path: Path, name: str, sha256: str, advance: Advance) -> None:
        target = self._folder / name
        _copy(path, part_of(target), advance)
        place(target)

    def delete(self, name: str) -> None:
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as e:
            raise DataError(f"{self._folder / name}: cannot be removed: {e.strerror or e}") from e


def place(target: Path) -> None:
    """Rename `part_of(target)` to `target`.

    Raises:
        DataError: It cannot be renamed.
    """
    try:
        os.replace(part_of(target), target)
    except OSError as e:
        raise DataError(f"{target}: cannot be written: {e.strerror or e}") from e


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file atomically.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _copy(source: Path, target: Path, advance: Advance) -> None:
    try:
        reading = source.open("rb")
    except OSError as e:
        raise DataError(f"{source}: cannot be read: {e.strerror or e}") from e
    with reading:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while chunk := reading.read(CHUNK):
                    file.write(chunk)
                    advance(len(chunk))
        except OSError as e:
            raise DataError(
                f"{target.parent}: cannot be written: {e.strerror or e}; put that right and run it again, it continues"
            ) from e
