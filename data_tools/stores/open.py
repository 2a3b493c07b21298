"""Opening the store of a path or URL."""

from __future__ import annotations

from pathlib import Path

from data_tools.stores.s3 import S3Store
from data_tools.stores.store import LocalStore, Store
from stamo_dist.data.at_hand import HUB
from stamo_dist.errors import DataError


def open_store(path: str, pause: float = 1.0) -> Store:
    """The store at a folder or URL.

    Args:
        path: Folder or s3://BUCKET/PREFIX.
        pause: Seconds before a failing request is made again; each further pause doubles.

    Raises:
        DataError: The kind of URL is not supported.
    """
    if "://" not in path:
        return LocalStore(Path(path).expanduser().absolute())
    if path.startswith("s3://"):
        return S3Store(path, pause)
    what = "only a local folder or s3://BUCKET/PREFIX can be looked at or copied here"
    if found := HUB.fullmatch(path):
        at = f" --revision {found['revision']}" if found["revision"] else ""
        what += f"; `hf download {found['repo']} --repo-type dataset{at} --local-dir DIR` brings it here"
    raise DataError(f"{path}: {what}")
