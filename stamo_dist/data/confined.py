"""What a source's manifest and indexes may ask for: columns of plain values, and files inside the source's folder.

Free of torch and streaming.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from stamo_dist.errors import DataError

#: MDS encodings that hold plain values, with or without a `:` and settings. streaming reads `pkl` with pickle, which
#: runs what it holds.
PLAIN = (
    "bytes", "str", "int", "ndarray", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "float32", "float64", "str_int", "str_float", "str_decimal", "pil", "jpeg", "jpeg_array", "jpegarray",
    "png", "list[pil]", "list[jpeg]", "list[png]", "json",
)  # fmt: skip


def check_columns(encodings: Iterable[Any], where: str) -> None:
    """Raises: DataError: A column is of a type that may run code, or that is unknown."""
    if other := sorted({str(e) for e in encodings if str(e).partition(":")[0] not in PLAIN}):
        raise DataError(f"{where}: has columns of type {', '.join(other)}, which may run code; convert it again")


def check_file_name(name: Any, where: str) -> None:
    """Raises: DataError: It is not the name of a file in the folder of `where`."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name.startswith("."):
        raise DataError(f"{where}: {name!r} is not a file name; take the source from where it was made")


def check_index(entries: Iterable[Mapping[str, Any]], where: str) -> None:
    """Check all shards of an index.json.

    Raises:
        DataError: As `check_columns` and `check_file_name`.
    """
    known: set[tuple[Any, ...]] = set()
    for entry in entries:
        for file in filter(None, (entry["raw_data"], entry.get("zip_data"))):
            check_file_name(file["basename"], where)
        if (columns := tuple(entry["column_encodings"])) not in known:
            check_columns(columns, where)
            known.add(columns)


def check_folder_name(name: str, where: str) -> None:
    """Raises: DataError: A split or camera would lie outside the source's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: {name!r} is not a folder of the source; take the source from where it was made")
