"""One fault at a time in the metadata of a dataset: JSON, JSON lines, tables, HDF5, parquet, TFRecords.

`mutations(path)` lists every fault of a file by field; each is applied to a copy in place. Kinds in SAME leave the
meaning as it is; so do those that a reader may refuse but must not read as something else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEEP = 100_000
HUGE = 10**18
#: Kinds after which the file says what it said.
SAME = ("as text", "in a list", "twice", "byte order mark", "shuffled rows", "other width", "blank line", "crlf")
#: Kinds that take an episode's own entry away.
GONE = ("drop", "rename", "drop line", "missing", "one row less", "no rows")

Field = tuple[str, ...]
Change = Callable[[Path], None]


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
    kinds = {".json": _json_faults, ".jsonl": _lines_faults, ".csv": _csv_faults, ".parquet": _parquet_faults,
             ".h5": _hdf5_faults, ".hdf5": _hdf5_faults}  # fmt: skip
    if path.name in (".zarray", ".zgroup", ".zattrs"):
        inner = _json_faults(path)
    else:
        inner = kinds[path.suffix](path) if path.suffix in kinds else iter(())
    found: dict[Field, list[Mutation]] = {}
    for field, kind, change, value in [*_file_faults(path), *inner]:
        found.setdefault(field, []).append(Mutation(file, field, kind, change, value))
    return found


_Faults = Iterator[tuple[Field, str, Change, Any]]


# --- any file ---------------------------------------------------------------------------------------------------------


def _bytes(edit: Callable[[bytes], bytes]) -> Change:
    return lambda path: void(path.write_bytes(edit(path.read_bytes())))


def void(_: Any) -> None:
    """Nothing, whatever came before."""


def _file_faults(path: Path) -> _Faults:
    text = path.suffix in (".json", ".jsonl", ".csv", "") or path.name.startswith(".z")
    yield (), "missing", lambda p: p.unlink(), None
    yield (), "empty file", lambda p: void(p.write_bytes(b"")), None
    yield (), "a folder", lambda p: (p.unlink(), p.mkdir())[1], None
    yield (), "a link to nothing", lambda p: (p.unlink(), p.symlink_to("nowhere"))[1], None
    yield (), "LFS pointer", _bytes(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), None
    for share in (0.1, 0.5, 0.9, 0.99):
        yield (), f"cut at {share:.0%}", _bytes(lambda b, s=share: b[: int(len(b) * s)]), None  # type: ignore[misc]
    yield (), "zeros", _bytes(lambda b: b"\0" * len(b)), None
    if text:
        for share in (0.1, 0.3, 0.5, 0.8):
            yield (), "not UTF-8", _bytes(lambda b, s=share: _put(b, int(len(b) * s), b"\xff")), None  # type: ignore[misc]
        yield (), "byte order mark", _bytes(lambda b: b"\xef\xbb\xbf" + b), None
        yield (), "UTF-16", _bytes(lambda b: b.decode().encode("utf-16")), None
        yield (), "a null byte", _bytes(lambda b: _put(b, len(b) // 2, b"\0")), None
        yield (), "crlf", _bytes(lambda b: b.replace(b"\n", b"\r\n")), None


def _put(data: bytes, at: int, more: bytes) -> bytes:
    return data[:at] + more + data[at:]


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_faults(path: Path) -> _Faults:
    whole = json.loads(path.read_text())
    for field, kind, edited, value in _value_faults(whole):
        yield field, kind, lambda p, t=edited: void(p.write_text(t)), value  # type: ignore[misc]
    yield (), "nested too deep", lambda p: void(p.write_text("[" * DEEP + "]" * DEEP)), None
    yield (), "twice in a row", _bytes(lambda b: b + b), None


def _lines_faults(path: Path) -> _Faults:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):

        def put(new: list[str], n: int = number) -> Change:
            return lambda p: void(p.write_text("".join(f"{one}\n" for one in [*lines[:n], *new, *lines[n + 1 :]])))

        for field, kind, edited, value in _value_faults(json.loads(line)):
            yield (f"line {number}", *field), kind, put([edited]), value
        at = (f"line {number}",)
        yield at, "drop line", put([]), None
        yield at, "item twice", put([line, line]), None
        yield at, "blank line", put([line, ""]), None
        yield at, "nested too deep", put(["[" * DEEP + "]" * DEEP]), None


def _value_faults(whole: Any) -> Iterator[tuple[Field, str, str, Any]]:
    """(field, kind, the document's new text, the new value)."""
    for field in _fields(whole):
        old = _at(whole, field)
        for kind, new in _replacements(old):
            edited = copy.deepcopy(whole)
            if field:
                _at(edited, field[:-1])[_key(_at(edited, field[:-1]), field[-1])] = new
            else:
                edited = new
            yield field, kind, json.dumps(edited), new
        if not field:
            continue
        parent, key = _at(whole, field[:-1]), field[-1]
        less = copy.deepcopy(whole)
        del _at(less, field[:-1])[_key(parent, key)]
        yield field, "drop", json.dumps(less), None
        more = copy.deepcopy(whole)
        holder = _at(more, field[:-1])
        if isinstance(holder, dict):
            renamed = {f"{k}_x" if k == key else k: v for k, v in holder.items()}
            holder.clear()
            holder.update(renamed)
            yield field, "rename", json.dumps(more), None
            mark = {"<": 1}
            doubled = copy.deepcopy(whole)
            _at(doubled, field[:-1])[key] = mark
            once = json.dumps(old)
            yield field, "twice", json.dumps(doubled).replace(json.dumps(mark), f"{once}, {json.dumps(key)}: {once}", 1), old
        else:
            holder.insert(int(key), copy.deepcopy(old))
            yield field, "item twice", json.dumps(more), None


def _replacements(old: Any) -> Iterator[tuple[str, Any]]:
    yield "null", None
    yield "in a list", [old]
    yield "deeper", {"value": old}
    yield "empty text", ""
    yield "empty list", []
    yield "empty object", {}
    yield "true", True
    if isinstance(old, bool):
        yield "as text", str(old)
        yield "a number", 7
    elif isinstance(old, int | float):
        yield "as text", str(old)
        yield "a text", "many"
        yield "negative", -old - 1
        yield "huge", HUGE
        yield "huger", 10**400
        yield "huge float", 1e308
        yield "NaN", float("nan")
        yield "infinite", float("inf")
        yield "zero", 0
        yield "one more", old + 1
        yield "fraction", old + 0.5
        yield "as float", float(old)
    elif isinstance(old, str):
        yield "a number", 7
        yield "NaN", float("nan")
        yield "U+2028", f"{old}\u2028"
        yield "lone surrogate", f"{old}\ud800"
        yield "null character", f"{old}\0"
        yield "another text", f"{old} x"
        yield "parts", f"../{old}"
        yield "a list of texts", list(old)
    elif isinstance(old, list):
        yield "a number", 7
        yield "a text", "many"
        yield "scalar", old[0] if old else 0
        yield "nulls", [None] * len(old)
        yield "one more", [*old, *old[-1:]]
        yield "numbers", list(range(len(old)))
        yield "an object", {str(n): v for n, v in enumerate(old)}
    elif isinstance(old, dict):
        yield "a number", 7
        yield "a text", "many"
        yield "scalar", next(iter(old.values()), 0)
        yield "a list of values", list(old.values())


def _fields(node: Any, at: Field = ()) -> Iterator[Field]:
    yield at
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from _fields(child, (*at, str(key)))


def _at(node: Any, field: Field) -> Any:
    for part in field:
        node = node[_key(node, part)]
    return node


def _key(node: Any, part: str) -> Any:
    return int(part) if isinstance(node, list) else part


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_faults(path: Path) -> _Faults:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    header = rows[0]

    def put(new: list[list[str]]) -> Change:
        return lambda p: void(p.write_text("".join(",".join(row) + "\n" for row in new)))

    yield (), "header alone", put(rows[:1]), None
    yield (), "no header", put(rows[1:]), None
    yield (), "an open quote", put([*rows[:1], ['"' + rows[1][0], *rows[1][1:]], *rows[2:]]), None
    yield (), "semicolons", _bytes(lambda b: b.replace(b",", b";")), None
    for c, name in enumerate(header):
        yield (name,), "drop", put([row[:c] + row[c + 1 :] for row in rows]), None
        yield (name,), "rename", put([[*header[:c], f"{name}_x", *header[c + 1 :]], *rows[1:]]), None
        yield (name,), "twice", put([[*row, row[c]] for row in rows]), None
        for r in range(1, len(rows)):
            for kind, cell in (
                ("empty text", ""), ("a text", "many"), ("negative", f"-{rows[r][c]}"), ("NaN", "nan"),
                ("infinite", "inf"), ("huge", "1e308"), ("zero", "0"), ("U+2028", f"{rows[r][c]}\u2028"),
                ("null character", f"{rows[r][c]}\0"), ("quoted", f'"{rows[r][c]}"'), ("parts", f"../{rows[r][c]}"),
                ("decimal comma", '"1,5"'), ("very long", "x" * 200_000),
            ):  # fmt: skip
                new = [list(row) for row in rows]
                new[r][c] = cell
                yield (f"row {r + 1}", name), kind, put(new), cell.strip('"')
    for r in range(1, len(rows)):
        at = (f"row {r + 1}",)
        yield at, "drop line", put(rows[:r] + rows[r + 1 :]), None
        yield at, "item twice", put([*rows[: r + 1], *rows[r:]]), None
        yield at, "short row", put([*rows[:r], rows[r][:1], *rows[r + 1 :]]), None
        yield at, "long row", put([*rows[:r], [*rows[r], "more", "more"], *rows[r + 1 :]]), None
        yield at, "blank line", put([*rows[:r], [""], *rows[r:]]), None


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_faults(path: Path) -> _Faults:
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


def _hdf5_faults(path: Path) -> _Faults:
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


def _node_faults(name: str, at: Field, node: Any) -> _Faults:
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


def _attribute_faults(name: str, at: Field, attribute: str, value: Any) -> _Faults:
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
            for inner, kind, edited, new in _value_faults(json.loads(value)):
                yield (*field, *inner), kind, put(edited), new
    else:
        yield field, "as text", put(str(value)), None
        yield field, "in a list", put(np.array([value])), None
        yield field, "negative", put(-float(value) - 1), None
        yield field, "infinite", put(np.inf), None
        yield field, "zero", put(0), None
        yield field, "huge", put(1e300), None
