"""Instructions that the user gives in a table, for episodes whose dataset has none or the wrong ones."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.formats.source import EpisodeRef
from stamo_dist.errors import DataError
from stamo_dist.words import counted

#: The option of `stamo data convert` that takes a table; notes that contain it are about missing instructions.
FLAG = "--instructions"
_COLUMNS = ("episode", "instruction")
_NAMED = 3


def read_table(path: Path) -> dict[str, str]:
    """Episode id → instruction, from a CSV file with the columns episode and instruction.

    Raises:
        DataError: It cannot be read, lacks a column, or names an episode twice; names the file and line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := [c for c in _COLUMNS if c not in (rows.fieldnames or ())]:
                has = ", ".join(rows.fieldnames or ()) or "nothing"
                raise DataError(
                    f"{path}: its first line lacks {', '.join(missing)}; it has {has} (commas between, small letters)"
                )
            table: dict[str, str] = {}
            for row in rows:
                episode, text = ((row[c] or "").strip() for c in _COLUMNS)
                if not episode or not text:
                    raise DataError(f"{path}, line {rows.line_num}: needs an episode and an instruction")
                if episode in table:
                    raise DataError(f"{path}, line {rows.line_num}: {episode} is there twice")
                table[episode] = text
    except FileNotFoundError:
        columns = ", ".join(_COLUMNS)
        raise DataError(f"--instructions {path}: no such file; give a CSV with the columns {columns}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({e})") from e
    if not table:
        raise DataError(f"{path}: has no episode")
    return table


def give(episodes: Sequence[EpisodeRef], path: Path) -> tuple[list[EpisodeRef], list[str]]:
    """The episodes with the table's instructions, which override the dataset's own; and notes for the user.

    Raises:
        DataError: The table cannot be read, or none of its episodes is in the dataset.
    """
    table = read_table(path)
    unknown = table.keys() - {e.id for e in episodes}
    if len(unknown) == len(table):
        raise DataError(
            f"{path}: none of its {len(table)} episodes is in the dataset, whose first are "
            f"{', '.join(e.id for e in episodes[:_NAMED])}"
        )
    told = [replace(e, instruction=table[e.id], task=table[e.id], told=True) if e.id in table else e for e in episodes]
    notes = [f"instructions: {path.name} has those of {counted(len(table) - len(unknown), 'episode')}"]
    if replaced := sum(bool(e.instruction) and e.instruction != table.get(e.id, e.instruction) for e in episodes):
        notes.append(f"instructions: {replaced} of these had another one in the dataset")
    if unknown:
        more = ", …" if len(unknown) > _NAMED else ""
        notes.append(
            f"instructions: {path.name} has {counted(len(unknown), 'episode')} that the dataset has not "
            f"({', '.join(sorted(unknown)[:_NAMED])}{more})"
        )
    return told, notes


def silent(episodes: Sequence[EpisodeRef]) -> list[str]:
    """A note where episodes have no instruction."""
    none = [e.id for e in episodes if not e.instruction.strip()]
    if not none:
        return []
    more = ", …" if len(none) > _NAMED else ""
    return [
        f"instructions: {len(none)} of {len(episodes)} episodes have none ({', '.join(none[:_NAMED])}{more}), which a "
        f"policy needs; give them with {FLAG} FILE.csv (columns episode,instruction)"
    ]
