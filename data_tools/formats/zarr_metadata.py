"""The metadata of a zarr folder as checked values, before zarr reads them: an error names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.formats.checked import a_list, a_text, an_object, read_object, shown, whole
from stamo_dist.errors import DataError

ARRAY, GROUP, ATTRIBUTES, V3 = ".zarray", ".zgroup", ".zattrs", "zarr.json"


def check_metadata(folder: Path) -> None:
    """Raises:
    DataError: A file of the folder's metadata is no JSON, or says what no array can be.
    """
    for path in sorted(p for name in (ARRAY, GROUP, ATTRIBUTES, V3) for p in folder.rglob(name)):
        about = read_object(path)
        if path.name == ARRAY:
            _check_array(about, path)
        elif path.name == V3:
            _check_v3(about, path)
        if path.name in (ARRAY, GROUP) and about.get("zarr_format") != 2:
            raise DataError(f"{path}, zarr_format: must be 2, not {shown(about.get('zarr_format'))}")


def _check_array(about: Mapping[str, Any], path: Path) -> None:
    _check_sizes(about.get("shape"), about.get("chunks"), f"{path}, shape", f"{path}, chunks")
    dtype = about.get("dtype")
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
            if isinstance(size, bool) or not isinstance(size, int) or whole(size, where) < least:
                raise DataError(f"{where}: must be whole numbers from {least} on, not {shown(value)}")
    if len(shape) != len(chunks):
        raise DataError(f"{of_chunks}: has {len(chunks)} axes, and the shape {len(shape)}")
