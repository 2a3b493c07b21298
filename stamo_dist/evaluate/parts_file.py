"""The finished parts of a measurement on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stamo_dist.run.folder import write_atomic


class PartsFile:
    """A line of JSON a part, after one with the `identity` (weights, data, settings) they were measured under.

    Every process writes a file of its own and reads those of all. Parts of another identity are deleted.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int = 0):
        self._head = json.dumps(identity, sort_keys=True, default=str)
        self._path = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self._main = not rank
        self._all = lambda: (path, *path.parent.glob(f"{path.stem}.*{path.suffix}"))
        self._done = dict[str, Any]()
        for file in self._all():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            head, *lines = file.read_text().splitlines()
        except (FileNotFoundError, ValueError):  # the first process has removed it, or it is empty
            return
        if head != self._head:
            if self._main:
                file.unlink()
            return
        for line in lines:
            try:
                part = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            self._done[part["part"]] = part["value"]

    def known(self, parts: Iterable[str]) -> dict[str, Any]:
        """Values of those of `parts` that are measured."""
        return {part: self._done[part] for part in parts if part in self._done}

    def get(self, part: str, measure: Callable[[], Any]) -> Any:
        """The value that an earlier start measured, or that `measure` returns now: something JSON can hold."""
        if part not in self._done:
            self._done[part] = value = measure()
            if not self._path.is_file():
                write_atomic(self._path, self._head + "\n")
            with self._path.open("a") as f:
                f.write("\n" + json.dumps({"part": part, "value": value}))
        return self._done[part]

    def close(self) -> None:
        """Everything is measured and in the result: the first process removes the files of all."""
        for file in self._all() if self._main else ():
            file.unlink(missing_ok=True)
