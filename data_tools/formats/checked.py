"""Type-checked access to metadata fields; every error names the file and the field.

`where` is the place for messages: FILE, FIELD.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.formats.source import check_lfs
from stamo_dist.errors import DataError

#: Whole numbers are below this, as in the int64 that datasets store.
_LIMIT = 1 << 63
_FASTEST_HZ = 10_000


def read_text(path: Path) -> str:
    """A file's UTF-8 text.

    Raises:
        DataError: The file cannot be read, is a Git LFS pointer, or is not UTF-8.
    """
    check_lfs(path)
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[e.start]:#x}); save the file as UTF-8") from e


def parse(text: str, where: str) -> Any:
    """Parse a JSON text.

    Raises:
        DataError: It is not JSON, nested too deeply, or contains unpaired surrogates.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from e
    if "\\ud" in text.lower() and (halves := next(_unpaired_surrogates(value, ""), None)) is not None:
        raise DataError(f"{where}{halves}: half a character (one of a surrogate pair) in a text")
    return value


def _unpaired_surrogates(value: Any, at: str) -> Iterator[str]:
    """The paths of strings that cannot be encoded as UTF-8 (unpaired surrogates)."""
    if isinstance(value, str) and not is_text(value):
        yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield from _unpaired_surrogates(str(key), f"{at}, {key!a}")
        yield from _unpaired_surrogates(child, f"{at}{'.' if at else ', '}{key!s}")


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8; undecodable bytes appear as unpaired surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: The file is missing, or not JSON.
    """
    return parse(read_text(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        DataError: It is not.
    """
    return an_object(read_json(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSON-lines file; lines end at a line feed only.

    Raises:
        DataError: A line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, an_object(parse(line, where), where)


def an_object(value: Any, where: str) -> dict[str, Any]:
    """Raises:
    DataError: The value is not a JSON object.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object, not {shown(value)}")
    return value


def a_list(value: Any, where: str) -> list[Any]:
    """Raises:
    DataError: The value is not a list.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: must be a list, not {shown(value)}")
    return value


def a_text(value: Any, where: str) -> str:
    """Raises:
    DataError: The value is not a string.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: must be a text, not {shown(value)}")
    return value


def text_at(holder: Mapping[str, Any], key: str, where: str) -> str:
    """A string field of an object; "" if it is missing.

    Raises:
        DataError: It is something else.
    """
    value = holder.get(key)
    return "" if value is None else a_text(value, f"{where}, {key}").strip()


def object_at(holder: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object field of an object; {} if it is missing.

    Raises:
        DataError: It is something else.
    """
    value = holder.get(key)
    return {} if value is None else an_object(value, f"{where}, {key}")


def list_at(holder: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list field of an object; [] if it is missing.

    Raises:
        DataError: It is something else.
    """
    value = holder.get(key)
    return [] if value is None else a_list(value, f"{where}, {key}")


def whole(value: Any, where: str) -> int:
    """An integer ≥ 0; also accepted as a string, or as the only item of a list.

    Raises:
        DataError: It is not.
    """
    number = _number(value)
    if number is None or number != int(number) or not 0 <= number < _LIMIT:
        raise DataError(f"{where}: must be a whole number, not {shown(value)}")
    return int(number)


def seconds(value: Any, where: str) -> float:
    """A finite number; also accepted as a string, or as the only item of a list.

    Raises:
        DataError: It is not.
    """
    number = _number(value)
    if number is None:
        raise DataError(f"{where}: must be a number of seconds, not {shown(value)}")
    return number


def positive(value: Any, where: str, what: str = "a positive number") -> float:
    """A finite number above 0; also accepted as a string, or as the only item of a list.

    Raises:
        DataError: It is not; the message says that it must be `what`.
    """
    number = _number(value)
    if number is None or number <= 0:
        raise DataError(f"{where}: must be {what}, not {shown(value)}")
    return number


def rate(value: Any, where: str) -> float:
    """A plausible rate in Hz of a robot or camera.

    Raises:
        DataError: It is not plausible.
    """
    number = _number(value)
    if number is None or not 0 < number <= _FASTEST_HZ:
        raise DataError(f"{where}: must be a positive number of Hz up to {_FASTEST_HZ}, not {shown(value)}")
    return number


def flag(value: Any, where: str) -> bool:
    """A boolean; also accepted as 1 and 0, or as a word.

    Raises:
        DataError: It is neither.
    """
    said = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(str(value).lower())
    if said is None:
        raise DataError(f"{where}: must be true or false, not {shown(value)}")
    return said


def shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _number(value: Any) -> float | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
