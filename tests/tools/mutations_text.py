"""Faults in any file, in JSON and in CSV; see mutations.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = 100_000
HUGE = 10**18

Field = tuple[str, ...]
Change = Callable[[Path], None]
Faults = Iterator[tuple[Field, str, Change, Any]]


# --- any file ---------------------------------------------------------------------------------------------------------


def _bytes(edit: Callable[[bytes], bytes]) -> Change:
    return lambda path: void(path.write_bytes(edit(path.read_bytes())))


def void(_: Any) -> None:
    """Nothing, whatever came before."""


def file_faults(path: Path) -> Faults:
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


def json_faults(path: Path) -> Faults:
    whole = json.loads(path.read_text())
    for field, kind, edited, value in value_faults(whole):
        yield field, kind, lambda p, t=edited: void(p.write_text(t)), value  # type: ignore[misc]
    yield (), "nested too deep", lambda p: void(p.write_text("[" * DEEP + "]" * DEEP)), None
    yield (), "twice in a row", _bytes(lambda b: b + b), None


def lines_faults(path: Path) -> Faults:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):

        def put(new: list[str], n: int = number) -> Change:
            return lambda p: void(p.write_text("".join(f"{one}\n" for one in [*lines[:n], *new, *lines[n + 1 :]])))

        for field, kind, edited, value in value_faults(json.loads(line)):
            yield (f"line {number}", *field), kind, put([edited]), value
        at = (f"line {number}",)
        yield at, "drop line", put([]), None
        yield at, "item twice", put([line, line]), None
        yield at, "blank line", put([line, ""]), None
        yield at, "nested too deep", put(["[" * DEEP + "]" * DEEP]), None


def value_faults(whole: Any) -> Iterator[tuple[Field, str, str, Any]]:
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
            yield (
                field,
                "twice",
                json.dumps(doubled).replace(json.dumps(mark), f"{once}, {json.dumps(key)}: {once}", 1),
                old,
            )
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


def csv_faults(path: Path) -> Faults:
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
