"""CALVIN's language annotations: windows of frames, each with a text that describes it.

lang_annotations/auto_lang_ann.npy   a pickled dict: info.indx, (start, end) of each window, both included;
                                     language.ann, its text; language.task, the task's name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.pickled import load_pickled
from stamo_dist.errors import DataError

FOLDER = "lang_annotations"
FILE = "auto_lang_ann.npy"


@dataclass(frozen=True, order=True)
class Annotated:
    """A window of frames, both ends included."""

    start: int
    end: int
    text: str
    task: str


def annotation_folders(split: Path) -> list[str]:
    """The folders of a split that have annotations, the usual one first."""
    found = sorted(path.parent.name for path in split.glob(f"lang*/{FILE}"))
    return sorted(found, key=lambda name: name != FOLDER)


def read_annotations(path: Path) -> list[Annotated]:
    """The annotated windows of a split, by their start.

    Raises:
        DataError: The file cannot be read, or is not laid out as CALVIN's.
    """
    found = load_pickled(path)
    try:
        windows, texts = list(found["info"]["indx"]), list(found["language"]["ann"])
        tasks = list(found["language"].get("task", texts))
        if not len(windows) == len(texts) == len(tasks):
            raise ValueError(f"{len(windows)} windows, {len(texts)} texts, {len(tasks)} tasks")
        return sorted(
            Annotated(int(start), int(end), _text(text), _text(task))
            for (start, end), text, task in zip(windows, texts, tasks, strict=True)
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise DataError(
            f"{path}: no info.indx with (start, end) and language.ann with as many texts ({type(e).__name__}: {e})"
        ) from e


def _text(value: Any) -> str:
    """A text, unwrapped from a list or array of one item."""
    while isinstance(value, (list, tuple, np.ndarray)):
        value = value[0]
    return str(value).strip()


def said(windows: Sequence[Annotated], start: int, length: int) -> list[str]:
    """The text at each of `length` frames from `start` on: that of the latest window that contains it, else ""."""
    texts = [""] * length
    for window in sorted(windows):
        first, last = max(window.start - start, 0), min(window.end - start, length - 1)
        for t in range(first, last + 1):
            texts[t] = window.text
    return texts


def overlaps(windows: Sequence[Annotated]) -> int:
    """How many windows begin before an earlier one has ended."""
    count, latest = 0, -1
    for window in sorted(windows):
        count += window.start <= latest
        latest = max(latest, window.end)
    return count
