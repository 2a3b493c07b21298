"""Downloading remote datasets before conversion: s3://BUCKET/PREFIX and datasets of the Hub.

Copies are kept and reused: of s3:// in a folder of the user's cache, of the Hub in the Hub's own cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from data_tools.stores.progress import bytes_bar
from data_tools.stores.store import Advance, part_of, place
from stamo_dist.data.at_hand import HUB, HUB_FORM
from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from data_tools.stores.s3 import S3Store

#: Files downloaded at once.
PARALLEL = 8
#: Accepted difference (s) between the times of a file and its copy: file systems round.
SAME_TIME = 2.0
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")
#: Scheme → the command that copies from there.
_COPY = {
    "gs": "gsutil -m cp -r {url} DIR",
    "azure": "azcopy copy URL DIR --recursive",
    "oci": "oci os object bulk-download --download-dir DIR …",
    "http": "wget -r -np {url}",
    "https": "wget -r -np {url}",
}


@dataclass(frozen=True)
class Brought:
    """The local path of a dataset, and what was downloaded."""

    url: str
    path: Path
    files: int
    bytes: int
    there: int  # files that were already local

    def __str__(self) -> str:
        kept = f"{self.url}: in {self.path}, which is kept; remove it when it is no longer needed"
        return f"{kept} ({self.files} files, {self.bytes / 1e6:.1f} MB fetched; {self.there} files were there already)"


def is_remote(src: str) -> bool:
    """Whether a source is a URL or a Hub dataset id OWNER/NAME, rather than a local path."""
    if "://" in src:
        return True
    return _HUB_ID.fullmatch(src) is not None and not Path(src).exists() and not Path(src).parent.exists()


def bring(src: str, work: Path | None = None, quiet: bool = False) -> Brought:
    """Copy a dataset to this machine, if it is not there yet; after a kill, another run continues file by file.

    Args:
        src: s3://BUCKET/PREFIX, hf://datasets/OWNER/NAME[@REVISION][/PATH], or OWNER/NAME of the Hub.
        work: Folder for copies of s3://; one of the user's cache when omitted.
        quiet: No progress bar.

    Raises:
        DataError: It does not exist, may not be read, cannot be reached, or its URL scheme is not supported.
    """
    if src.startswith("s3://"):
        return _from_s3(src, work or _cache(), quiet)
    if "://" not in src:
        return _from_hub(src, f"hf://datasets/{src}")
    if src.startswith("hf://"):
        return _from_hub(src, src)
    scheme = src.split("://", 1)[0]
    command = _COPY.get(scheme, "").format(url=src)
    raise DataError(
        f"{src}: {scheme}:// is not fetched from here, only s3:// and hf://datasets/OWNER/NAME are; copy it to a "
        + (f"folder (`{command}`) and convert that" if command else "folder and convert that")
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stamo" / "sources"


def _from_s3(url: str, cache: Path, quiet: bool) -> Brought:
    from data_tools.stores.s3 import S3Store

    url = url.rstrip("/")
    store, listed, single = S3Store(url), {}, ""
    listed = {name: entry for name, entry in store.listing().items() if _is_inside(name)}
    if not listed and url.count("/") > 2:
        parent, single = url.rsplit("/", 1)
        store = S3Store(parent)
        listed = {name: entry for name, entry in store.listing(single).items() if name == single}
    if not listed:
        raise DataError(f"{url}: nothing is there; check the URL")
    name = url.rsplit("/", 1)[-1]
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    target = folder if single else folder / name
    with _exclusive(folder):
        missing = {name: entry for name, entry in listed.items() if not _is_same(target / name, *entry)}
        _fetch_all(store, target, missing, quiet)
        _remove_others(target, listed)
    sizes = [size for size, _ in missing.values()]
    return Brought(url, folder / name, len(missing), sum(sizes), len(listed) - len(missing))


def _is_inside(name: str) -> bool:
    """Whether a key is a file below the folder."""
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _is_same(path: Path, size: int, written: float) -> bool:
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.st_size == size and abs(stat.st_mtime - written) < SAME_TIME


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one run at a time download it; the others wait and then use the copy.

    Raises:
        DataError: The folder cannot be written.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as e:
        raise DataError(
            f"{folder}: cannot be written: {e.strerror or e}; name another folder with --work DIR or XDG_CACHE_HOME"
        ) from e
    try:
        yield
    finally:
        lock.release()


def _fetch_all(store: S3Store, target: Path, files: Mapping[str, tuple[int, float]], quiet: bool) -> None:
    """Raises:
    DataError: The first file that could not be downloaded.
    """
    total = sum(size for size, _ in files.values())
    with bytes_bar("fetch", total, quiet) as advance, ThreadPoolExecutor(PARALLEL) as pool:
        running = [pool.submit(partial(_fetch, store, target, name, *files[name], advance)) for name in files]
        try:
            for one in running:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(store: S3Store, target: Path, name: str, size: int, written: float, advance: Advance) -> None:
    """Download one file; it gets its final name when complete, and the original's modification time."""
    path = target / name
    store.fetch(name, part_of(path), advance)
    if part_of(path).stat().st_size != size:
        raise DataError(f"{store.url}/{name}: changed while it was fetched; run it again")
    os.utime(part_of(path), (written, written))
    place(path)


def _remove_others(target: Path, listed: Iterable[str]) -> None:
    """Remove files of an earlier copy that the dataset no longer has."""
    wanted = {target / name for name in listed}
    for path in [path for path in target.rglob("*") if path.is_file() or path.is_symlink()]:
        if path not in wanted:
            path.unlink(missing_ok=True)


def _from_hub(said: str, url: str) -> Brought:
    """Download a Hub dataset, or a folder or file of one, into the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    match = HUB.fullmatch(url)
    if match is None:
        raise DataError(f"{said}: {HUB_FORM}")
    repo, revision, path = match["repo"], match["revision"], match["path"]
    before = _there(repo)
    try:
        root = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=[path, f"{path}/*"] if path else None
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise DataError(_refused(said, repo, revision, e)) from e
    found = root / path if path else root
    if not found.exists():
        raise DataError(f"{said}: {repo} has no {path}; it is spelt as on the Hub's page of its files")
    files = [file for file in (found.rglob("*") if found.is_dir() else [found]) if file.is_file()]
    new = [file for file in files if file.resolve() not in before]
    return Brought(said, found, len(new), sum(file.stat().st_size for file in new), len(files) - len(new))


def _there(repo: str) -> set[Path]:
    """The files of a dataset in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "blobs"
    return {path.resolve() for path in blobs.glob("*")}


def _refused(said: str, repo: str, revision: str | None, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[0] if lines else type(error).__name__
    local = f"there is no file or folder {said}, and " if "://" not in said else ""
    at = f" --revision {revision}" if revision else ""
    return (
        f"{said}: {local}the Hub did not supply the data set {repo} ({type(error).__name__}: {why}); check its name; "
        "for a gated or private one `hf auth login` or set HF_TOKEN; without network run "
        f"`hf download {repo} --repo-type dataset{at} --local-dir DIR` where there is some, and convert DIR"
    )
