"""Canonical paths, asked of a shared disk as seldom as possible."""

from __future__ import annotations

import os
from functools import lru_cache


def canonical(path: str | os.PathLike[str]) -> str:
    """As os.path.realpath, but each folder is looked up once per process: on a shared disk each is a request."""
    path = os.path.join(os.getcwd(), path)
    return os.path.realpath(path) if ".." in path.split("/") else _canonical(os.path.normpath(path))


@lru_cache(maxsize=4096)
def _canonical(path: str) -> str:
    folder, name = os.path.split(path)
    if not name:
        return path
    real = os.path.join(_canonical(folder), name)
    return os.path.realpath(real) if os.path.islink(real) else real
