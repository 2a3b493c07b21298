"""Segments of videos by timestamp, and the tables that list them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.formats.checked import a_list, a_text, an_object, read_json, shown
from stamo_dist.errors import DataError

#: Accepted column names; the first is ours, the others are those of public datasets.
COLUMNS = {
    "video": ("video", "video_id", "video_uid", "file", "path"),
    "start": ("start", "start_timestamp", "start_sec", "start_time"),
    "end": ("end", "stop_timestamp", "end_sec", "end_time", "stop"),
    "text": ("text", "instruction", "narration", "label", "caption"),
    "id": ("id", "narration_id"),
    "split": ("split",),
}
#: Frame numbers are wrong for mixed frame rates, so they are left out even of the metadata.
_CELLS = "(cells)"
_UNUSED = ("start_frame", "stop_frame", "end_frame")


@dataclass(frozen=True)
class Segment:
    """A part of a video that becomes an episode."""

    where: str  # file and row, for messages
    video: str  # name used by the annotation
    start: float = 0.0  # seconds since the video begins
    end: float | None = None  # None: the video's end
    text: str = ""
    id: str = ""
    split: str = ""
    task: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""  # why it cannot be used, judged by the annotation alone


def seconds(text: Any) -> float:
    """Seconds from a number, or from [HH:]MM:SS[.fraction].

    Raises:
        ValueError: It is neither, negative, or not finite.
    """
    parts = [float(part) for part in str(text).strip().split(":")]
    value = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    if len(parts) > 3 or min(parts) < 0 or not math.isfinite(value) or any(part >= 60 for part in parts[1:]):
        raise ValueError(text)
    return value


def read_table(path: Path, split: str = "", timed: bool = False) -> list[Segment]:
    """Segments of a .csv or .tsv with a header, or a .json: a list of objects, or {VIDEO: [objects]}.

    A row without start begins with the video, one without end ends with it (with `timed` both are required); one
    without split belongs to `split`. Other columns become metadata.

    Raises:
        DataError: The file cannot be read or has no column with the video.
    """
    rows = list(_csv_rows(path) if path.suffix.lower() in (".csv", ".tsv") else _json_rows(path))
    if not rows:
        raise DataError(f"{path}: no segments in it")
    if not any(name in row for _, row in rows for name in COLUMNS["video"]):
        raise DataError(
            f"{path}: no column video; a table of segments has the columns video, start, end (seconds or HH:MM:SS.mmm) "
            "and text, and may have id and split"
        )
    return [_segment(f"{path.name} {where}", row, split, timed) for where, row in rows]


def split_of(path: Path) -> str:
    """The split in an annotation file's name, as in something-something-v2-train.json."""
    found = re.search(r"(?:^|[^a-z])(train|val|test)", path.stem.lower())
    return found[1] if found else ""


def once(segments: Sequence[Segment]) -> Sequence[Segment]:
    """Check that the segments' ids are unique.

    Raises:
        DataError: They are not.
    """
    seen: dict[str, Segment] = {}
    for segment in segments:
        if segment.id and seen.setdefault(segment.id, segment) is not segment:
            raise DataError(f"{segment.where}: id {segment.id!r} is that of {seen[segment.id].where} too")
    return segments


def read_labels(path: Path) -> dict[str, str]:
    """Instructions by video from a .json: {VIDEO: text}, or a list of objects with a video (or id) and a text.

    Raises:
        DataError: It has another form.
    """
    raw = read_json(path)
    if isinstance(raw, list):
        rows = [_typed(an_object(row, f"{path}, item {n}"), f"{path}, item {n}") for n, row in enumerate(raw, start=1)]
        raw = {_first(row, (*COLUMNS["video"], "id")): _first(row, COLUMNS["text"]) for row in rows}
    if not isinstance(raw, dict) or not all(raw):
        raise DataError(f"{path}: must be {{VIDEO: text}}, or a list of objects with video and text")
    return {str(video): a_text(text, f"{path}, {video}").strip() for video, text in raw.items()}


def around(times: Sequence[float], window: float) -> list[tuple[float, float]]:
    """Segments of a video for descriptions of single (increasing) times: `window` seconds around each.

    If two times are closer than that, their midpoint separates the segments: no frame is in two of them.
    """
    borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(times)), math.inf]
    half = window / 2
    return [(max(0.0, t - half, borders[i]), min(t + half, borders[i + 1])) for i, t in enumerate(times)]


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise DataError(f"{path}: has two columns {twice[0]}")
            for row in reader:
                more: Any = row.pop(None, ())
                full = sum(value is not None for value in row.values()) + len(more)
                cells: dict[str, Any] = {k.strip().lower(): v for k, v in row.items() if k}
                if full != len(row):
                    cells[_CELLS] = f"{full} of {len(row)}"
                yield f"row {reader.line_num}", cells
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a CSV in UTF-8: {e}") from e
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV: {e}") from e


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    raw = read_json(path)
    if isinstance(raw, dict) and isinstance(raw.get("segments"), list):
        raw = raw["segments"]
    if isinstance(raw, dict):
        raw = [
            {"video": video, **an_object(part, f"{path}, {video}.{n}")}
            for video, parts in raw.items()
            for n, part in enumerate(a_list(parts, f"{path}, {video}"))
        ]
    if not isinstance(raw, list):
        raise DataError(f"{path}: must be a list of objects, or {{VIDEO: [objects]}}")
    for number, row in enumerate(raw, start=1):
        where = f"{path}, item {number}"
        yield f"item {number}", _typed(an_object(row, where), where)


def _typed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A JSON row, after checking that known columns are strings, or numbers if allowed.

    Raises:
        DataError: One has another type.
    """
    for ours, names in COLUMNS.items():
        for name in names:
            value = row.get(name)
            if ours == "text" and value is not None:
                a_text(value, f"{where}, {name}")
            elif isinstance(value, bool | list | dict):
                raise DataError(f"{where}, {name}: must be a text or a number, not {shown(value)}")
    return row


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The value of the first of these columns that is not empty."""
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), "")


def _segment(where: str, row: Mapping[str, Any], split: str, timed: bool) -> Segment:
    values = {ours: _first(row, names) for ours, names in COLUMNS.items()}
    faults, times = [], {"start": 0.0, "end": None}
    for key in times:
        if values[key]:
            try:
                times[key] = seconds(values[key])
            except ValueError:
                faults.append(f"{key} {values[key]!r} is neither seconds nor HH:MM:SS.mmm")
    if _CELLS in row:
        faults.append(f"has {row[_CELLS]} columns; a text with a comma needs quotes")
    if timed:
        faults += [f"no {COLUMNS[key][1]}" for key in times if not values[key]]
    start, end = times["start"] or 0.0, times["end"]
    if end is not None and not faults and start >= end:
        faults.append(f"start {values['start'] or 0} is not before end {values['end']}")
    if not values["video"]:
        faults.append("no video")
    used = {_CELLS, *_UNUSED, *(name for names in COLUMNS.values() for name in names)}
    return Segment(
        where=where,
        video=values["video"].removeprefix("./"),
        start=start,
        end=end,
        text=values["text"],
        id=values["id"],
        split=values["split"] or split,
        meta={k: v for k, v in row.items() if k not in used and v not in (None, "")},
        fault="; ".join(faults),
    )
