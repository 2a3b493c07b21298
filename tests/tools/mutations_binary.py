"""Faults in parquet and HDF5; see mutations.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mutations_text import HUGE, Change, Faults, Field, value_faults

# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet_faults(path: Path) -> Faults:
    table = pq.read_table(path)

    def write(edit: Callable[[pa.Table], pa.Table]) -> Change:
        return lambda p: pq.write_table(edit(pq.read_table(p, partitioning=None)), p)

    def column(c: int, make: Callable[[pa.ChunkedArray], Any]) -> Change:
        return write(lambda t: t.set_column(c, t.column_names[c], make(t.column(c))))

    yield (), "no rows", write(lambda t: t.slice(0, 0)), None
    yield (), "one row less", write(lambda t: t.slice(0, len(t) - 1)), None
    yield (), "one row more", write(lambda t: pa.concat_tables([t, t.slice(len(t) - 1)])), None
    yield (), "shuffled rows", write(lambda t: t.take(pa.array(np.random.default_rng(0).permutation(len(t))))), None
    yield (), "no columns", write(lambda t: t.select([])), None
    for c, name in enumerate(table.column_names):
        values = table.column(c).to_pylist()
        kind = table.schema.field(c).type
        yield (name,), "drop", write(lambda t, c=c: t.remove_column(c)), None  # type: ignore[misc]
        yield (name,), "rename", write(lambda t, c=c: t.rename_columns(  # type: ignore[misc]
            [f"{n}_x" if i == c else n for i, n in enumerate(t.column_names)])), None  # fmt: skip
        yield (name,), "twice", write(lambda t, c=c: t.append_column(t.schema.field(c), t.column(c))), None  # type: ignore[misc]
        for what, new in _columns(values, kind):
            yield (name,), what, column(c, lambda _, new=new: new), None  # type: ignore[misc]


def _columns(values: list[Any], kind: pa.DataType) -> Iterator[tuple[str, pa.Array]]:
    """Other contents of a column."""
    n = len(values)
    yield "a null", pa.array([None, *values[1:]], kind)
    yield "nulls", pa.nulls(n, kind)
    yield "nulls of no type", pa.nulls(n)
    yield "texts", pa.array([str(v) for v in values])
    yield "bytes", pa.array([str(v).encode() for v in values])
    yield "booleans", pa.array([bool(k % 2) for k in range(n)])
    yield "objects", pa.array([{"value": 1.0}] * n)
    yield "in a list", pa.array([[v] for v in values], pa.list_(kind))
    yield "empty lists", pa.array([[]] * n, pa.list_(pa.float64()))
    yield "dates", pa.array([0] * n, pa.timestamp("ns"))
    if pa.types.is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        yield "one list longer", pa.array([[*values[0], 1], *values[1:]], kind)
        yield "lists longer", pa.array([[*v, 1] for v in values], kind)
        yield "lists shorter", pa.array([v[:-1] for v in values], kind)
        yield "lists swapped", pa.array([[*values[0], 1], values[1][:-1], *values[2:]], kind)
        yield "a null inside", pa.array([[None, *values[0][1:]], *values[1:]], kind)
        yield "other width", pa.array(values, pa.list_(pa.float64()))
        yield "whole numbers", pa.array([[int(x) for x in v] for v in values], pa.list_(pa.int32()))
        yield "texts inside", pa.array([[str(x) for x in v] for v in values])
        yield "scalars", pa.array([v[0] for v in values])
        yield "NaN", pa.array([[float("nan")] * len(v) for v in values], pa.list_(pa.float64()))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield "other width", pa.array(values, pa.float64())
        yield "NaN", pa.array([float("nan"), *values[1:]], pa.float64())
        yield "huge", pa.array([HUGE, *map(int, values[1:])], pa.int64())
        yield "infinite", pa.array([*values[:-1], float("inf")], pa.float64())
        yield "negative", pa.array([-v - 1 for v in values], kind)
        yield "all alike", pa.array(values[-1:] * n, kind)
        yield "one more", pa.array([v + 1 for v in values], kind)
        yield "backwards", pa.array(values[::-1], kind)
        yield "fractions", pa.array([v + 0.25 for v in values], pa.float64())
    elif pa.types.is_string(kind):
        yield "numbers", pa.array(range(n))
        yield "empty texts", pa.array([""] * n)


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def hdf5_faults(path: Path) -> Faults:
    names: list[str] = [""]
    with h5py.File(path) as file:
        file.visit(names.append)
        for name in names:
            node = file[name or "/"]
            at = tuple(part for part in name.split("/") if part)
            for attribute, value in node.attrs.items():
                yield from _attribute_faults(name, at, attribute, value)
            if name:
                yield from _node_faults(name, at, node)


def _edit(edit: Callable[[h5py.File], Any]) -> Change:
    def change(path: Path) -> None:
        with h5py.File(path, "a") as file:
            edit(file)

    return change


def _replace(name: str, make: Callable[[Any], Any]) -> Change:
    """Puts another dataset in place of one."""

    def edit(file: h5py.File) -> None:
        new = make(file[name])
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = new
        if not isinstance(new, h5py.SoftLink | h5py.ExternalLink):
            file[name].attrs.update(attributes)

    return _edit(edit)


def _node_faults(name: str, at: Field, node: Any) -> Faults:
    text = h5py.string_dtype()

    def drop(file: h5py.File) -> None:
        del file[name]

    yield at, "drop", _edit(drop), None
    yield at, "rename", _edit(lambda file: file.move(name, f"{name}_x")), None
    yield at, "a link to nothing", _replace(name, lambda _: h5py.SoftLink("/nowhere")), None
    yield at, "another file's", _replace(name, lambda _: h5py.ExternalLink("nowhere.h5", "/x")), None
    yield at, "a scalar", _replace(name, lambda _: 7.0), None
    yield at, "a text", _replace(name, lambda _: np.array("many", text)), None
    yield at, "empty dataset", _replace(name, lambda _: h5py.Empty("f4")), None
    yield at, "empty group", _edit(lambda file: (drop(file), file.create_group(name))), None
    if not isinstance(node, h5py.Dataset):
        return
    yield at, "no rows", _replace(name, lambda d: d[:0]), None
    yield at, "one row less", _replace(name, lambda d: d[:-1]), None
    yield at, "one row more", _replace(name, lambda d: np.concatenate([d[:], d[-1:]]).astype(d.dtype)), None
    yield at, "another axis", _replace(name, lambda d: d[:][..., None]), None
    yield at, "an axis less", _replace(name, lambda d: d[:].reshape(len(d), -1)[:, 0]), None
    yield at, "texts", _replace(name, lambda d: np.array(["many"] * len(d), text)), None
    if node.dtype.kind in "fiu":
        yield at, "numbers as texts", _replace(name, lambda d: np.vectorize(str, otypes=["O"])(d[:]).astype(text)), None
    yield at, "records", _replace(name, lambda d: np.zeros(len(d), [("a", "f4"), ("b", "i4")])), None
    yield at, "lists", _replace(name, _ragged), None
    if node.ndim > 1:
        yield at, "turned over", _replace(name, lambda d: d[:].swapaxes(0, -1)), None
        yield at, "a number less", _replace(name, lambda d: d[:][..., :-1]), None
    if node.dtype.kind in "fiu":
        yield at, "booleans", _replace(name, lambda d: d[:] > 0), None
        yield at, "complex", _replace(name, lambda d: d[:].astype(complex)), None
    if node.dtype.kind == "f":
        yield at, "NaN", _replace(name, lambda d: d[:] * np.nan), None
        yield at, "other width", _replace(name, lambda d: d[:].astype(np.float64)), None
        yield at, "infinite", _replace(name, lambda d: d[:] * 0 + np.inf), None
    if node.dtype.kind == "u":
        yield at, "signed", _replace(name, lambda d: d[:].astype(np.int16)), None
        yield at, "floats", _replace(name, lambda d: d[:] / 255), None


def _ragged(dataset: Any) -> Any:
    rows = np.empty(len(dataset), h5py.vlen_dtype(np.float32))
    for k in range(len(dataset)):
        rows[k] = np.arange(k % 3, dtype=np.float32)
    return rows


def _attribute_faults(name: str, at: Field, attribute: str, value: Any) -> Faults:
    def put(new: Any) -> Change:
        return _edit(lambda file: file[name or "/"].attrs.__setitem__(attribute, new))

    def drop(file: h5py.File) -> None:
        del file[name or "/"].attrs[attribute]

    field = (*at, f"@{attribute}")
    yield field, "drop", _edit(drop), None
    yield field, "null", put(h5py.Empty("S1")), None
    yield field, "empty text", put(""), ""
    yield field, "a number", put(7), None
    yield field, "NaN", put(np.nan), None
    yield field, "numbers", put(np.arange(3)), None
    yield field, "no numbers", put(np.zeros(0)), None
    yield field, "another text", put("many"), "many"
    yield field, "not UTF-8", put(np.bytes_(b"\xff\xfe")), None
    yield field, "true", put(True), None
    if isinstance(value, str):
        yield field, "as bytes", put(np.bytes_(value.encode())), value
        yield field, "in a list", put(np.array([value], h5py.string_dtype())), value
        yield field, "U+2028", put(f"{value}\u2028"), f"{value}\u2028"
        if value.startswith("{"):
            yield field, "cut", put(value[: len(value) // 2]), None
            yield field, "nested too deep", put("[" * 20_000 + "]" * 20_000), None
            for inner, kind, edited, new in value_faults(json.loads(value)):
                yield (*field, *inner), kind, put(edited), new
    else:
        yield field, "as text", put(str(value)), None
        yield field, "in a list", put(np.array([value])), None
        yield field, "negative", put(-float(value) - 1), None
        yield field, "infinite", put(np.inf), None
        yield field, "zero", put(0), None
        yield field, "huge", put(1e300), None
