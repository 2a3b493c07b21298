"""The record of verified shards, so that unchanged shards are not verified again.

Stored in SOURCE/.verified.json, or in the user's cache if the source is remote or read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_tools.stores.store import Stat, Store, write_whole

VERIFIED = ".verified.json"
BYTES, FRAMES = "bytes", "frames"  # verified depth: the checksum; the checksum and decoding of every frame


Entry = dict[str, Any]


def holds(entry: Entry | None, stat: Stat, sha256: str, depth: str = BYTES) -> bool:
    """Whether a file is unchanged since it was verified to at least this depth."""
    if entry is None or not sha256:
        return False
    same = (entry.get("size"), entry.get("stamp"), entry.get("sha256")) == (stat.size, stat.stamp, sha256)
    return same and (depth == BYTES or entry.get("depth") == FRAMES)


class Verified:
    """The record of one source. A damaged record counts as empty.

    Args:
        store: The source.
        cache: Folder for sources that cannot hold the record themselves.
    """

    def __init__(self, store: Store, cache: Path | None = None):
        home = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stamo" / "verified"
        aside = home / f"{hashlib.sha256(store.url.encode()).hexdigest()[:16]}.json"
        inside = store.local / VERIFIED if store.local else None
        self._source = store.url
        self._places = [path for path in (inside, aside) if path]
        self._entries: dict[str, Entry] = {}
        for path in reversed(self._places):
            self._entries |= _read(path, store.url)
        self._changed = False

    def get(self, name: str) -> Entry | None:
        """The entry of a file; `holds` tells whether it is still valid."""
        return self._entries.get(name)

    def add(self, name: str, stat: Stat, sha256: str, depth: str, **more: Any) -> None:
        """Record that a file was verified."""
        self._entries[name] = {"size": stat.size, "stamp": stat.stamp, "sha256": sha256, "depth": depth, **more}
        self._changed = True

    def forget(self, name: str) -> None:
        """Remove the entry of a damaged file."""
        self._changed |= self._entries.pop(name, None) is not None

    def save(self) -> None:
        """Write the record, if it can be written."""
        if not self._changed:
            return
        content = json.dumps({"source": self._source, "files": self._entries}, sort_keys=True).encode()
        for path in self._places:
            try:
                write_whole(path, content)
            except OSError:
                continue
            self._changed = False
            return


def _read(path: Path, source: str) -> dict[str, Entry]:
    try:
        record = json.loads(path.read_bytes())
        # A record that was copied along with a source does not apply to the copy.
        files = record["files"] if record["source"] == source else {}
        return {str(k): v for k, v in files.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
