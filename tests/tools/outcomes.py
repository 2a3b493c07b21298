"""What a conversion of a mutated dataset came to, and whether that is one of the two allowed ways out."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mutated_sets import Tiny
from mutations import SAME, Mutation
from remade import read

from data_tools.convert.driver import convert
from data_tools.convert.guard import REPORT
from stamo_dist.errors import DataError

#: A value's text in place of an instruction: something else was read as one.
NO_TEXT = re.compile(r"^\s*([\[{(].*|None|nan|inf|null|True|False|[-+.\d]+(e[-+]?\d+)?|<.*>|b'.*)\s*$", re.DOTALL)


#: Kinds after which there is less, or something else, to be read.
LESS = ("drop", "rename", "drop line", "missing", "a folder", "empty list", "empty object", "null", "header alone",
        "a number less", "scalar", "true", "parts", "another text", "a link to nothing")  # fmt: skip
#: Words by which a note speaks of a part of the result.
WORDS = {"proprio": ("state",), "frames": ("camera", "depth map")}


@dataclass
class Outcome:
    """Columns by episode and name; or the error."""

    episodes: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    said: str = ""  # what was skipped and noted
    skipped: list[str] = field(default_factory=list)
    rate: float = 0.0
    error: Exception | None = None


def outcome(tiny: Tiny, root: Path, out: Path) -> Outcome:
    """Convert `root`, in this process."""
    options = {k: _located(v, root) for k, v in tiny.options.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            manifest, _ = convert(
                tiny.format, root / tiny.src, out, size=32, val_fraction=0, quiet=True, processes=1, options=options
            )
    except Exception as e:
        return Outcome(error=e)
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for split in manifest.splits:
        for camera in manifest.cameras:
            for sample in read(out, split, camera):
                episode = found[sample["episode"]]
                episode[f"frames of {camera}"].append(sample["image"])
                for name, column in COLUMNS.items():
                    if column in sample and camera == manifest.cameras[0]:
                        value = sample[column]
                        episode[name].append(value.tolist() if isinstance(value, np.ndarray) else value)
    return Outcome(
        {k: dict(v) for k, v in found.items()},
        "\n".join([*manifest.skipped, *manifest.notes]),
        manifest.skipped,
        manifest.rate_hz,
    )


#: What every format's values depend on.
ALWAYS = (
    (r"/(demo|traj)_\d+:drop", "episodes"),
    (r"(h5|hdf5) :(missing|a folder)$", "episodes"),
    (r"(h5|hdf5) .*:booleans", "action proprio"),
    (r"(control_freq|rate_hz):(a number|one more|fraction|true|zero|negative|empty|null|drop|rename)", "time"),
)
COLUMNS = {
    "time": "time",
    "action": "original_action",
    "mapped action": "action",
    "proprio": "proprio",
    "text": "instruction",
}


def _located(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_located(v, root) for v in value]
    return root / value[1:] if isinstance(value, str) and value.startswith("/") else value


def problems(tiny: Tiny, mutation: Mutation, was: Outcome, now: Outcome) -> Iterator[str]:
    """What is wrong with the outcome of a mutated dataset; `was`: the outcome of the whole one."""
    if now.error is not None:
        yield from _error_problems(tiny, mutation, was, now.error)
        return
    may_change = set() if mutation.kind in SAME else may(tiny, mutation)
    cut = mutation.kind.startswith("cut at") and mutation.file.endswith(".csv")
    if (
        len(now.episodes) < len(was.episodes)
        and mutation.kind not in LESS
        and not cut
        and "left out" not in now.said
        and not now.skipped
    ):
        yield f"{len(now.episodes)} episodes of {len(was.episodes)} without a word"
    if "episodes" not in may_change:
        for id in was.episodes.keys() - now.episodes.keys():
            if id not in now.said and f"{id.rsplit('/', 1)[-1]}" not in now.said:
                yield f"{id} is missing without a word"
        if more := now.episodes.keys() - was.episodes.keys():
            yield f"episodes from nowhere: {', '.join(more)}"
    if REPORT in now.said:
        yield f"an unexpected error: {now.said[:300]}"
    if now.rate != was.rate and "time" not in may_change and "rate" not in now.said and "fps" not in now.said:
        yield f"the rate is {now.rate:g} for {was.rate:g}"
    for id, columns in now.episodes.items():
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            yield f"{id}: lengths differ: {lengths}"
        for name in ("action", "mapped action", "proprio", "time"):
            if name in columns and not np.isfinite(np.array(columns[name], float)).all():
                yield f"{id}: {name} is not finite"
        for text in set(columns["text"]):
            if NO_TEXT.match(text) and text != mutation.value and mutation.kind != "texts":
                yield f"{id}: the instruction is {text!r}"
        if id in was.episodes:
            yield from _differences(id, was.episodes[id], columns, may_change, now.said, mutation.value)


def _differences(
    id: str, was: Mapping[str, list[Any]], now: Mapping[str, list[Any]], may: set[str], said: str, value: Any
) -> Iterator[str]:
    if "length" in may:
        return
    for name in was.keys() | now.keys():
        kind = "frames" if name.startswith("frames") else "action" if name == "mapped action" else name
        if kind in may:
            continue
        if name not in now or name not in was:
            if not any(word in said for word in (kind, *WORDS.get(kind, ()))):
                yield f"{id}: {name} {'is gone' if name in was else 'came up'} without a word"
        elif len(was[name]) != len(now[name]):
            if id not in said:
                yield f"{id}: {name}: {len(now[name])} for {len(was[name])} without a word"
        elif (t := _first_difference(name, was[name], now[name])) is not None:
            a, b = was[name][t], now[name][t]
            if f"chunks of {'state' if kind == 'proprio' else kind} are not stored" in said:
                continue
            if name == "text" and (b == value or (not b and "instruction" in said)):
                continue
            yield f"{id}: {name} at {t}: {str(b)[:60]} for {str(a)[:60]}"


def _first_difference(name: str, was: list[Any], now: list[Any]) -> int | None:
    if name == "time":  # may be stored as float32
        return next((t for t, (a, b) in enumerate(zip(was, now, strict=True)) if abs(a - b) > 1e-6), None)
    return next((t for t, (a, b) in enumerate(zip(was, now, strict=True)) if a != b), None)


def may(tiny: Tiny, mutation: Mutation) -> set[str]:
    """What may change with this field."""
    where = f"{mutation.file} {'/'.join(mutation.field)}:{mutation.kind}"
    return {what for pattern, whats in (*tiny.touches, *ALWAYS) if re.search(pattern, where) for what in whats.split()}


def _error_problems(tiny: Tiny, mutation: Mutation, was: Outcome, error: Exception) -> Iterator[str]:
    text = str(error)
    if not isinstance(error, DataError):
        yield f"{type(error).__name__}: {text[:200]}"
        return
    if REPORT in text:
        yield f"an unexpected error: {text[:300]}"
    if not text.strip():
        yield "an empty message"
    file = Path(mutation.file)
    if mutation.kind in ("missing", "a folder") and "file in this folder" in text:
        return
    places = [file.name, *was.episodes, *("/".join(p.parts[-2:]) for p in file.parents if len(p.parts) > 1)]
    places += [path.removeprefix("pusht.zarr/") for path in places]
    if not any(place in text for place in places):
        yield f"the error names no file: {text[:300]}"
    names = {part.lstrip("@") for part in mutation.field if not part.isdigit() and not re.match(r"(line|row) \d", part)}
    names |= (
        set()
        if not names
        else {alias for pattern, alias in tiny.aliases.items() if re.search(pattern, "/".join(mutation.field))}
    )
    if "no usable episode" in text or "no episode could be read" in text:
        return  # all were skipped, each by name
    if names and not any(name.lower() in text.lower() for name in names):
        yield f"the error names no field: {text[:300]}"
