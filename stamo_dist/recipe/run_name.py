"""Names of runs and pipelines, of which their folders below runs/ are made."""

from __future__ import annotations


def check_name(name: str) -> str:
    """The name, or "" for none.

    Raises:
        ValueError: Its folder would not lie in runs/, or a terminal or file system could not show it.
    """
    if name and (not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/"))):
        raise ValueError(
            f"{name!r} is no name of a folder in runs/: no '..', no '/' at its ends; set run_dir for a folder elsewhere"
        )
    return name
