"""Type checks of a zarr folder's metadata before zarr reads it; every error names the file and the field."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.formats.checked import a_list, a_text, an_object, object_at, read_object, shown
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

#: Upper bound on the length of an axis.
LARGEST = 10**10
#: Bytes of a Blosc header; the last four are the chunk's length, little endian:
#: github.com/Blosc/c-blosc, README_CHUNK_FORMAT.rst.
BLOSC_HEADER = 16
#: Exceptions that zarr and its codecs raise for invalid files.
DAMAGE = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    NotImplementedError,
    zipfile.BadZipFile,
)
ARRAY, GROUP, ATTRIBUTES, V3 = ".zarray", ".zgroup", ".zattrs", "zarr.json"


def check_folder(path: Path) -> None:
    """Raises:
    DataError: A file of a .zarr folder's metadata, or a chunk's length, is wrong; names the file. Zips have checksums.
    """
    if not path.is_dir():
        return
    check_metadata(path)
    with suppress(ImportError):  # reported when the buffer is opened
        import zarr

        check_nodes(path, lambda name: zarr.open(name, mode="r"))
    try:
        check_chunks(path)
    except OSError as e:
        raise DataError(f"{e.filename or path}: cannot be read ({e.strerror or e})") from e


def check_metadata(folder: Path) -> None:
    """Raises:
    DataError: A metadata file is not JSON, or does not describe a valid array.
    """
    for path in sorted(p for name in (ARRAY, GROUP, ATTRIBUTES, V3) for p in folder.rglob(name)):
        about = read_object(path)
        if path.name == ARRAY:
            _check_array(about, path)
        elif path.name == V3:
            _check_v3(about, path)
        if path.name in (ARRAY, GROUP) and about.get("zarr_format") != 2:
            raise DataError(f"{path}, zarr_format: must be 2, not {shown(about.get('zarr_format'))}")


def check_nodes(folder: Path, open_node: Callable[[str], Any]) -> None:
    """Open each array and group of the folder; call `check_metadata` first.

    Raises:
        DataError: zarr cannot open one.
    """
    for path in sorted(p for name in (ARRAY, GROUP, V3) for p in folder.rglob(name)):
        try:
            open_node(str(path.parent))
        except DAMAGE as e:
            hint = f"; {how_to_install('zarr')}" if re.search("codec .*not available", str(e)) else ""
            raise DataError(f"{path}: cannot be read as zarr's metadata ({type(e).__name__}: {e}){hint}") from e


def check_chunks(folder: Path) -> None:
    """Raises:
    DataError: A Blosc chunk, which has no checksum, has another length than its header states.
    """
    for path in sorted(folder.rglob(ARRAY)):
        compressor = read_object(path)["compressor"]
        if not isinstance(compressor, dict) or compressor.get("id") != "blosc":
            continue
        for chunk in (p for p in path.parent.rglob("*") if p.is_file() and not p.name.startswith(".")):
            with chunk.open("rb") as file:
                header = file.read(BLOSC_HEADER)
            length, said = chunk.stat().st_size, int.from_bytes(header[12:16], "little")
            if len(header) < BLOSC_HEADER or said != length:
                raise DataError(f"{chunk}: a chunk of {length} bytes that says it has {said}: truncated or corrupt")


def _check_array(about: Mapping[str, Any], path: Path) -> None:
    _check_sizes(about.get("shape"), about.get("chunks"), f"{path}, shape", f"{path}, chunks")
    dtype = about.get("dtype")
    if not dtype:
        raise DataError(f"{path}, dtype: missing")
    for part in dtype if isinstance(dtype, list) else [dtype]:
        if not isinstance(part, list):
            a_text(part, f"{path}, dtype")
    if about.get("order") not in ("C", "F"):
        raise DataError(f"{path}, order: must be C or F, not {shown(about.get('order'))}")
    if about.get("dimension_separator", ".") not in (".", "/"):
        raise DataError(f"{path}, dimension_separator: must be . or /, not {shown(about['dimension_separator'])}")
    for key in ("compressor", "filters", "fill_value"):
        if key not in about:
            raise DataError(f"{path}, {key}: missing")
    filters = about["filters"]
    codecs = [(about["compressor"], "compressor"), *((f, "filters") for f in a_list(filters or [], f"{path}, filters"))]
    if filters is not None and not isinstance(filters, list):
        raise DataError(f"{path}, filters: must be a list or null, not {shown(filters)}")
    for codec, key in codecs:
        if codec is not None:
            a_text(an_object(codec, f"{path}, {key}").get("id"), f"{path}, {key}.id")


def _check_v3(about: Mapping[str, Any], path: Path) -> None:
    if about.get("zarr_format") != 3:
        raise DataError(f"{path}, zarr_format: must be 3, not {shown(about.get('zarr_format'))}")
    if (kind := about.get("node_type")) not in ("array", "group"):
        raise DataError(f"{path}, node_type: must be array or group, not {shown(kind)}")
    object_at(about, "attributes", str(path))
    if kind == "group":
        return
    grid = an_object(about.get("chunk_grid"), f"{path}, chunk_grid")
    if grid.get("name") != "regular":
        raise DataError(f"{path}, chunk_grid.name: must be regular, not {shown(grid.get('name'))}")
    sizes = an_object(grid.get("configuration"), f"{path}, chunk_grid.configuration").get("chunk_shape")
    _check_sizes(about.get("shape"), sizes, f"{path}, shape", f"{path}, chunk_grid.configuration.chunk_shape")
    keys = an_object(about.get("chunk_key_encoding"), f"{path}, chunk_key_encoding")
    if keys.get("name") not in ("default", "v2"):
        raise DataError(f"{path}, chunk_key_encoding.name: must be default or v2, not {shown(keys.get('name'))}")
    if "data_type" not in about:
        raise DataError(f"{path}, data_type: missing")
    for number, codec in enumerate(a_list(about.get("codecs"), f"{path}, codecs")):
        if not isinstance(codec, str):
            a_text(an_object(codec, f"{path}, codecs.{number}").get("name"), f"{path}, codecs.{number}.name")


def _check_sizes(shape: Any, chunks: Any, of_shape: str, of_chunks: str) -> None:
    for value, where, least in ((shape, of_shape, 0), (chunks, of_chunks, 1)):
        for size in a_list(value, where):
            if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= LARGEST:
                raise DataError(f"{where}: must be whole numbers from {least} to {LARGEST}, not {shown(value)}")
    if len(shape) != len(chunks):
        raise DataError(f"{of_chunks}: has {len(chunks)} axes, and the shape {len(shape)}")
