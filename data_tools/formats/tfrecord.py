"""TFRecord files of tf.train.Example, without TensorFlow.

A TFRecord file is a sequence of records: length (uint64), masked CRC-32C of the length, content, masked CRC-32C of the
content (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). The content here is the
protobuf tf.train.Example, a map of names to lists of bytes, float32 or int64
(tensorflow/core/example/{example,feature}.proto), read from its wire format (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stamo_dist.errors import DataError

#: (start, stop) → the bytes in this range, fewer at the end of the file.
Fetch = Callable[[int, int], bytes]

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Longest accepted feature name; a longer one means a corrupt record.
_LONGEST_NAME = 1 << 12
_LONGEST_VARINT = 10


@dataclass(frozen=True)
class Record:
    """Position of a record's content in its file."""

    number: int  # from 0
    offset: int
    length: int


@dataclass(frozen=True)
class Values:
    """Position of one feature's list; `kind` is "bytes", "float", "int64" or "" (an empty feature)."""

    kind: str
    start: int
    stop: int


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus a constant."""
    import crc32c

    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan_records(path: Path) -> tuple[list[Record], str]:
    """The records, found by their headers alone, and why the rest of the file cannot be used ("" if it can).

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _scan(file.fileno(), size)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def _scan(file: int, size: int) -> tuple[list[Record], str]:
    records: list[Record] = []
    position = 0
    while position < size:
        number = len(records)
        header = os.pread(file, _HEADER.size, position)
        if len(header) < _HEADER.size:
            return records, f"truncated at byte {size}, within the header of record {number}"
        length, crc = _HEADER.unpack(header)
        if masked_crc(header[:8]) != crc:
            what = "not a TFRecord file" if not number else f"the header of record {number} is corrupt"
            return records, f"{what} (CRC-32C of the length at byte {position} is wrong)"
        content = position + _HEADER.size
        position = content + length + _CRC.size
        if position > size:
            return records, f"truncated at byte {size}, within record {number} (it ends at {position})"
        records.append(Record(number, content, length))
    return records, ""


def read_record(path: Path, record: Record) -> bytes:
    """A record's content, after verifying its checksum.

    Raises:
        DataError: It cannot be read, is truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            file.seek(record.offset)
            data = file.read(record.length + _CRC.size)
    except OSError as e:
        raise DataError(f"{path.name}: cannot be read: {e.strerror or e}") from e
    if len(data) < record.length + _CRC.size:
        raise DataError(f"{path.name}: truncated within record {record.number}")
    content = data[: record.length]
    if masked_crc(content) != _CRC.unpack_from(data, record.length)[0]:
        raise DataError(f"{path.name}: record {record.number} is corrupt (CRC-32C of its content is wrong)")
    return content


def window(file: int, size: int = 1 << 14) -> Fetch:
    """Reads of an open file through one cached window, for walks that skip large payloads."""
    cached, at = b"", 0

    def fetch(start: int, stop: int) -> bytes:
        nonlocal cached, at
        if not at <= start <= stop <= at + len(cached):
            cached, at = os.pread(file, max(size, stop - start), start), start
        return cached[start - at : stop - at]

    return fetch


def features(fetch: Fetch, start: int, stop: int) -> dict[str, Values]:
    """Positions of the features of the tf.train.Example in bytes [start, stop), without reading their values.

    Raises:
        DataError: Not a tf.train.Example.
    """
    found: dict[str, Values] = {}
    for field, a, b in _messages(fetch, start, stop):  # Example
        if field != 1:
            continue
        for field_, c, d in _messages(fetch, a, b):  # Features: entries of the map
            if field_ == 1:
                name, values = _entry(fetch, c, d)
                found[name] = values
    return found


def _entry(fetch: Fetch, start: int, stop: int) -> tuple[str, Values]:
    name, values = "", Values("", stop, stop)
    for field, a, b in _messages(fetch, start, stop):
        if field == 1:
            if b - a > _LONGEST_NAME:
                raise DataError("not a tf.train.Example (a feature's name is too long)")
            name = fetch(a, b).decode("utf-8", "replace")
        elif field == 2:
            for kind, c, d in _messages(fetch, a, b):  # Feature: one of three lists
                values = Values({1: "bytes", 2: "float", 3: "int64"}.get(kind, ""), c, d)
    return name, values


def _messages(fetch: Fetch, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, stop) of the length-delimited fields of a message; other fields are skipped."""
    position = start
    while position < stop:
        head = fetch(position, position + 2 * _LONGEST_VARINT)
        tag, used = (head[0], 1) if head and head[0] < 0x80 else _varint(head, 0)
        wire = tag & 7
        if wire == _BYTES:
            length, used = (head[1], 2) if used == 1 < len(head) and head[1] < 0x80 else _varint(head, used)
            end = position + used + length
            if end > stop:
                raise DataError("not a tf.train.Example (a field is longer than its message)")
            yield tag >> 3, position + used, end
            position = end
        elif wire == _VARINT:
            position += _varint(head, used)[1]
        elif wire in (_FIXED32, _FIXED64):
            position += used + (4 if wire == _FIXED32 else 8)
        else:
            raise DataError(f"not a tf.train.Example (wire type {wire})")


def _varint(head: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and the position after it."""
    value = shift = 0
    for byte in head[at : at + _LONGEST_VARINT]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DataError("not a tf.train.Example (a number has no end)")


def bytes_list(fetch: Fetch, values: Values) -> list[bytes]:
    """The values of a bytes feature."""
    _expect("bytes", values)
    return [fetch(a, b) for _, a, b in _messages(fetch, values.start, values.stop)]


def first_bytes(fetch: Fetch, values: Values) -> bytes | None:
    """The first value of a bytes feature, without reading the others."""
    _expect("bytes", values)
    return next((fetch(a, b) for _, a, b in _messages(fetch, values.start, values.stop)), None)


def numbers(fetch: Fetch, values: Values) -> np.ndarray:
    """The values of a float (float32) or int64 feature."""
    if not values.kind:
        return np.zeros(0, np.float32)
    _expect("float or int64", values)
    chunks = [fetch(a, b) for _, a, b in _messages(fetch, values.start, values.stop)]
    if values.stop > values.start and not chunks:
        return _unpacked(fetch(values.start, values.stop), values.kind)
    if values.kind == "float":
        return np.frombuffer(b"".join(chunks), "<f4")
    return _varints(b"".join(chunks))


def count(fetch: Fetch, values: Values) -> int:
    """How many values a feature has."""
    if values.kind == "bytes":
        return sum(1 for _ in _messages(fetch, values.start, values.stop))
    if values.kind == "float":
        return sum(b - a for _, a, b in _messages(fetch, values.start, values.stop)) // 4
    return len(numbers(fetch, values))


def _expect(kind: str, values: Values) -> None:
    if values.kind and values.kind not in kind:
        raise DataError(f"a feature holds {values.kind} values where {kind} values are expected")


def _unpacked(data: bytes, kind: str) -> np.ndarray:
    """The values of an unpacked repeated field, each after a tag of one byte."""
    if kind == "float":
        return np.frombuffer(data, np.dtype([("tag", "u1"), ("value", "<f4")]))["value"].copy()
    tagged = _varints(data)  # a tag is a varint too: tag, value, tag, value, …
    return tagged[1::2]


def _varints(data: bytes) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(ends) == len(raw):
        return raw.astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    decoded = np.zeros(len(ends), np.uint64)
    for k in range(int(lengths.max(initial=0))):
        longer = lengths > k
        part = (raw[starts[longer] + k] & 0x7F).astype(np.uint64)
        decoded[longer] |= part << np.uint64(7 * k)
    return decoded.view(np.int64)
