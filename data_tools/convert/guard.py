"""Turns unexpected exceptions of readers into error messages."""

from __future__ import annotations

from pathlib import Path

from data_tools.formats.source import Scan, SourceReader
from stamo_dist.errors import DataError, StamoError

REPORT = "please report it with this line"


def scanned(format: str, src: Path, reader: SourceReader) -> Scan:
    """The reader's scan of its source.

    Raises:
        DataError: The source cannot be used, or the reader raised an unexpected exception.
    """
    try:
        return reader.scan()
    except StamoError:
        raise
    except Exception as e:
        raise unforeseen(f"{src}: cannot be read as {format}", e) from e


def unforeseen(where: str, error: Exception) -> DataError:
    """The error message for an exception that the reader did not handle."""
    reason = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
    return DataError(f"{where} ({reason}); this was not foreseen, {REPORT}")
