"""`stamo data sync`: copy a source between folders and buckets, each file checked, the manifest last."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from data_tools.stores.open import open_store
from data_tools.stores.progress import bytes_bar
from data_tools.stores.store import Advance, DamagedError, Store, md5_of, part_of, place, sha256_of
from data_tools.stores.verified import BYTES, Verified, holds
from stamo_dist.data.agreement import check_content, check_shards, describing
from stamo_dist.data.confined import check_index
from stamo_dist.data.schema import EPISODES, MANIFEST, Manifest, first_entries, read_manifest
from stamo_dist.errors import DataError
from stamo_dist.words import counted

#: Maximum number of problems in one error.
SHOWN = 20


@dataclass
class Copied:
    """The result of a sync."""

    files: int = 0
    bytes: int = 0
    skipped: int = 0  # files that DST already had

    def __str__(self) -> str:
        return f"copied {counted(self.files, 'file')}, {self.bytes / 1e6:.1f} MB; {self.skipped} were there already"


@dataclass(frozen=True)
class _StoredFile:
    name: str
    size: int
    sha256: str  # "" if the manifest has no checksum of it

    @property
    def describes(self) -> bool:
        """Whether it is copied after the shards: an index, an episode table, the description of cached latents."""
        return self.name.endswith((".json", ".jsonl"))


def sync(
    src: str, dst: str, *, parallel: int = 8, overwrite: bool = False, quiet: bool = False, pause: float = 1.0
) -> Copied:
    """Copy a source.

    Every shard is compared with the manifest's sha256 during the copy. The manifest is written last, which makes DST a
    valid source. Run it again after a kill and it continues; files that DST already has are skipped. Requests that
    fail with a transient error are retried.

    Args:
        src: Folder or s3://BUCKET/PREFIX of a complete source.
        dst: Folder or URL to create or to complete.
        parallel: Files copied at once.
        overwrite: Replace another source or conversion in DST; not needed if SRC has only grown.
        quiet: No progress bar.
        pause: Seconds before the second attempt; each further pause doubles.

    Raises:
        DataError: SRC is incomplete or damaged, DST holds another source, or a file cannot be read or written.
    """
    source, target = open_store(src, pause), open_store(dst, pause)
    if source.url == target.url:
        raise DataError(f"{src}: SRC and DST are the same")
    manifest, text = fetch_manifest(source)
    files = _list(source, manifest)
    with _exclusive(target):
        old = _existing(target, manifest, overwrite)
        if old is not None and not _same(old, manifest) and not _grown(old, manifest):
            target.delete(MANIFEST)
            for name in sorted((set(old.checksums) & set(target.sizes())) - {file.name for file in files}):
                target.delete(name)
        done = _Copy(source, target).run(files, parallel, quiet)
        if target.stat(MANIFEST) is not None and target.read(MANIFEST) == text:
            done.skipped += 1
        else:
            put_bytes(target, MANIFEST, text)
            done.files, done.bytes = done.files + 1, done.bytes + len(text)
    return done


def fetch_manifest(store: Store) -> tuple[Manifest, bytes]:
    """The manifest of a source and its text.

    Raises:
        DataError: There is no complete source, or its manifest is damaged.
    """
    if store.local is not None:
        return read_manifest(store.local), store.read(MANIFEST)
    if store.stat(MANIFEST) is None:
        raise DataError(f"{store.url}: has no {MANIFEST}, so there is no whole source; check the URL")
    text = store.read(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(text)
        try:
            return read_manifest(Path(folder)), text
        except DataError as e:
            raise DataError(str(e).replace(folder, store.url)) from None


def put_bytes(store: Store, name: str, content: bytes) -> None:
    """Write a small file atomically.

    Raises:
        DataError: It cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "content"
        path.write_bytes(content)
        store.put(path, name, sha256_of(path), lambda _: None)


def _list(source: Store, manifest: Manifest) -> list[_StoredFile]:
    """All files but the manifest, cached latents included.

    Raises:
        DataError: Files are missing, or an index or table is not the manifest's, or an index names files elsewhere or
            columns that may run code.
    """
    needed = set(manifest.checksums)
    indexes = [f"{split}/{camera}/index.json" for split in manifest.splits for camera in manifest.cameras]
    needed |= {*indexes, *(f"{split}/{EPISODES}" for split in manifest.splits)}
    sizes = source.sizes()
    if missing := sorted(needed - set(sizes)):
        lines = [f"{source.url}: {len(missing)} files of the source are missing:", *_some(missing)]
        raise DataError("\n".join(lines))
    for split in manifest.splits:
        for name in describing(split, manifest.cameras):
            check_content(content := source.read(name), name, manifest, f"{source.url}/{name}")
            if name in indexes:
                _check_index(content, name, manifest, f"{source.url}/{name}")
    return [
        _StoredFile(name, size, manifest.checksums.get(name, "")) for name, size in sizes.items() if name != MANIFEST
    ]


def _check_index(text: bytes, name: str, manifest: Manifest, where: str) -> None:
    split, camera, _ = name.rsplit("/", 2)
    try:
        entries = json.loads(text)["shards"]
        check_index(entries, where)
        entries = first_entries(entries, manifest.splits[split].frames)
        check_shards(entries, manifest, split, camera, where)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise DataError(f"{where}: not an index of shards: {e}") from None


def _some(problems: list[str]) -> list[str]:
    rest = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"… and {rest} more"] if rest > 0 else [])


def _existing(target: Store, manifest: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest in DST.

    Raises:
        DataError: It belongs to another source and must not be replaced.
    """
    if target.stat(MANIFEST) is None:
        return None
    try:
        old, _ = fetch_manifest(target)
    except DataError as e:
        if overwrite:
            target.delete(MANIFEST)
            return None
        raise DataError(f"{e}; replace it with --overwrite, or choose another DST") from None
    if not _same(old, manifest) and not _grown(old, manifest) and not overwrite:
        raise DataError(
            f"{target.url}: holds another source or conversion ({old.name}: {old.source_format}, {old.image_size} px, "
            f"cameras {', '.join(old.cameras)}); choose another DST, or replace it with --overwrite"
        )
    return old


def _same(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests describe the same shards; statistics may be added later."""
    return a.model_dump(exclude={"stats"}) == b.model_dump(exclude={"stats"})


def _grown(old: Manifest, new: Manifest) -> bool:
    """Whether the new source extends the old one, so that files can be added while others read it."""
    times = len(old.before)
    if times >= len(new.before) or not old.checksums.items() <= new.checksums.items():
        return False
    changes = {
        "stats",
        "splits",
        "before",
        "checksums",
        "prefixes",
        "skipped",
        "notes",
        "source_fingerprint",
        "tool_version",
    }
    return new.as_of(times).splits == old.splits and old.model_dump(exclude=changes) == new.model_dump(exclude=changes)


@contextmanager
def _exclusive(target: Store) -> Iterator[None]:
    """Lock the folder against a second sync."""
    if target.local is None:
        yield
        return
    lock = FileLock(target.local / ".sync.lock")
    try:
        target.local.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{target.url}: another sync is writing it") from None
    except OSError as e:
        raise DataError(f"{target.url}: cannot be written: {e.strerror or e}") from e
    try:
        yield
    finally:
        lock.release()


class _Copy:
    """The transfers of one sync, in threads: disks, networks and sha256 do not hold the GIL."""

    def __init__(self, source: Store, target: Store):
        self.source, self.target = source, target
        self.done = Copied()
        self._there = target.sizes()
        self._record = Verified(target)
        self._lock = threading.Lock()
        self._advance: Advance = lambda _: None

    def run(self, files: list[_StoredFile], parallel: int, quiet: bool) -> Copied:
        """Copy the shards, then what describes them.

        Raises:
            DataError: Files that could not be copied, all of them.
        """
        try:
            with bytes_bar("sync", sum(file.size for file in files), quiet) as self._advance:
                for describing in (False, True):
                    problems = self._all((f for f in files if f.describes == describing), parallel)
                    if problems:
                        raise DataError("\n".join(_some(problems)))
        finally:
            self._record.save()
        return self.done

    def _all(self, files: Iterable[_StoredFile], parallel: int) -> list[str]:
        """Copy all, a bounded number in the queue; returns what failed, giving up after SHOWN failures."""
        waiting, problems = iter(files), []
        with ThreadPoolExecutor(parallel) as pool:
            running = {pool.submit(self._one, file) for file in islice(waiting, 2 * parallel)}
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        future.result()
                    except DataError as e:
                        problems.append(str(e))
                if len(problems) < SHOWN:
                    running |= {pool.submit(self._one, file) for file in islice(waiting, len(finished))}
        return list(dict.fromkeys(problems))

    def _one(self, file: _StoredFile) -> None:
        if self._there.get(file.name) == file.size and self._is_there(file):
            self._advance(file.size)
            with self._lock:
                self.done.skipped += 1
            return
        try:
            self._transfer(file)
        except DamagedError:  # a retry distinguishes a failed transfer from a damaged file
            self._transfer(file)
        with self._lock:
            self.done.files += 1
            self.done.bytes += file.size

    def _is_there(self, file: _StoredFile) -> bool:
        """Whether DST has the file with the same content."""
        stat = self.target.stat(file.name)
        if stat is None or stat.size != file.size:
            return False
        if self.target.local is None and not stat.sha256:  # written by another tool
            return bool(stat.md5 and self.source.local) and md5_of(self._source_path(file)) == stat.md5
        expected = file.sha256 or self._source_digest(file)
        if self.target.local is None:
            return stat.sha256 == expected
        with self._lock:
            if holds(self._record.get(file.name), stat, expected):
                return True
        if sha256_of(self.target.local / file.name) != expected:
            return False
        self._remember(file, expected)
        return True

    def _source_path(self, file: _StoredFile) -> Path:
        return (self.source.local or Path()) / file.name

    def _source_digest(self, file: _StoredFile) -> str:
        """sha256 of a file that the manifest has no checksum of; "" when the source does not know it."""
        if self.source.local is not None:
            return sha256_of(self._source_path(file))
        stat = self.source.stat(file.name)
        return stat.sha256 if stat else ""

    def _transfer(self, file: _StoredFile) -> None:
        """Copy one file; it gets its final name after its content was verified."""
        moved = 0

        def count(n: int) -> None:
            nonlocal moved
            moved += n
            self._advance(n)

        try:
            if self.target.local is not None:
                path = self.target.local / file.name
                self.source.fetch(file.name, part_of(path), count)
                digest = self._compare(file, part_of(path))
                place(path)
                self._remember(file, digest)
            elif self.source.local is not None:
                digest = self._compare(file, self._source_path(file))
                self.target.put(self._source_path(file), file.name, digest, count)
            else:
                with tempfile.TemporaryDirectory(prefix="stamo-") as folder:
                    path = Path(folder) / "file"
                    self.source.fetch(file.name, path, lambda _: None)
                    self.target.put(path, file.name, self._compare(file, path), count)
        except BaseException:
            self._advance(-moved)
            raise

    def _compare(self, file: _StoredFile, path: Path) -> str:
        digest = sha256_of(path)
        if file.sha256 and digest != file.sha256:
            if path.name.endswith(".part"):
                path.unlink()
            raise DamagedError(
                f"{self.source.url}/{file.name}: its sha256 is {digest[:12]}…, but the manifest says "
                f"{file.sha256[:12]}…: it is damaged; restore it, or convert the source again"
            )
        return digest

    def _remember(self, file: _StoredFile, digest: str) -> None:
        stat = self.target.stat(file.name)
        if file.sha256 and stat:
            with self._lock:
                self._record.add(file.name, stat, digest, BYTES)
