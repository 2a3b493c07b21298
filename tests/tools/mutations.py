"""One fault at a time in the metadata of a dataset: JSON, JSON lines, tables, HDF5, parquet, TFRecords.

`mutations(path)` lists every fault of a file by field; each is applied to a copy in place. Kinds in SAME leave the
meaning as it is; so do those that a reader may refuse but must not read as something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations_binary import hdf5_faults, parquet_faults
from mutations_text import Change, Field, csv_faults, file_faults, json_faults, lines_faults

#: Kinds after which the file says what it said.
SAME = ("as text", "in a list", "twice", "byte order mark", "shuffled rows", "other width", "blank line", "crlf")
#: Kinds that take an episode's own entry away.
GONE = ("drop", "rename", "drop line", "missing", "one row less", "no rows")


@dataclass(frozen=True)
class Mutation:
    """One fault: in which file (relative to the dataset), of which field ((): the whole file), of which kind."""

    file: str
    field: Field
    kind: str
    change: Change
    value: Any = None  # what stands there now, where that is a text

    def __str__(self) -> str:
        return f"{self.file} {'/'.join(self.field) or '(whole)'}: {self.kind}"

    __repr__ = __str__

    def apply(self, root: Path) -> None:
        path = root / self.file
        if path.is_symlink() or path.stat().st_nlink > 1:  # sources are linked, not copied
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        self.change(path)


def mutations(root: Path, file: str) -> dict[Field, list[Mutation]]:
    """Every fault of a file, by field; the whole file's under ()."""
    path = root / file
    kinds = {".json": json_faults, ".jsonl": lines_faults, ".csv": csv_faults, ".parquet": parquet_faults,
             ".h5": hdf5_faults, ".hdf5": hdf5_faults}  # fmt: skip
    if path.name in (".zarray", ".zgroup", ".zattrs"):
        inner = json_faults(path)
    else:
        inner = kinds[path.suffix](path) if path.suffix in kinds else iter(())
    found: dict[Field, list[Mutation]] = {}
    for field, kind, change, value in [*file_faults(path), *inner]:
        found.setdefault(field, []).append(Mutation(file, field, kind, change, value))
    return found
