"""Instructions of a LeRobotDataset: of each row by its task_index, else of the episode table.

LeRobot's own reader gives each row the text of its task_index (LeRobotDataset.__getitem__) and ignores the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from data_tools.formats.lerobot_meta import LeRobotFeature
from stamo_dist.errors import DataError
from stamo_dist.recipe.layers import did_you_mean

TASK_INDEX = "task_index"
#: GR00T's columns with the number of a text; some of its texts are quality labels of the episode.
ANNOTATION = "annotation.human."
VERDICTS = ("valid", "invalid")


def instruction_column(asked: str, features: Mapping[str, LeRobotFeature]) -> str | None:
    """The feature with each row's instruction; None: there is none, or `asked` is "none". "" searches for it.

    Raises:
        DataError: `asked` is not a feature.
    """
    if asked == "none":
        return None
    if asked:
        if asked not in features:
            hint = did_you_mean(asked, features) or f"there is: {', '.join(features)}"
            raise DataError(f"instruction: no feature {asked!r}; {hint}")
        return asked
    described = [name for name in features if name.startswith(ANNOTATION) and name.endswith("description")]
    return next(iter(described), TASK_INDEX)


def table_texts(tasks: Sequence[str | int], texts: Mapping[int, str]) -> list[str]:
    """The episode's instructions by the episode table, without quality labels."""
    said = [text for task in tasks if (text := task if isinstance(task, str) else texts.get(task))]
    return [text for text in dict.fromkeys(said) if len(said) == 1 or text.strip().lower() not in VERDICTS]


def row_texts(column: pa.ChunkedArray, name: str, texts: Mapping[int, str], otherwise: str = "") -> list[str]:
    """Each row's instruction: its text, the text of its number, or `otherwise` if it has neither.

    Raises:
        DataError: A number has no text.
    """
    values = column.to_pylist()
    values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    values = [
        int(value) if isinstance(value, str) and value.isdecimal() and int(value) in texts else value
        for value in values
    ]
    for value in values:
        if not isinstance(value, str | None) and (not isinstance(value, int | float) or value not in texts):
            raise DataError(f"{name}: {value!r} is no task_index of meta/tasks")
        if isinstance(value, bool):
            raise DataError(f"{name}: {value!r} is no number of a task, nor a text")
    return [value if isinstance(value, str) else otherwise if value is None else texts[value] for value in values]
