"""The last line behind the readers: an exception that none of them foresaw ends in a message, too."""

from __future__ import annotations

from pathlib import Path

from data_tools.formats.source import Scan, SourceReader
from stamo_dist.errors import DataError, StamoError

REPORT = "please report it with this line"


def scanned(format: str, src: Path, reader: SourceReader) -> Scan:
    """What the reader finds.

    Raises:
        DataError: The source cannot be used, or the reader has a fault.
    """
    try:
        return reader.scan()
    except StamoError:
        raise
    except Exception as e:
        raise unforeseen(f"{src}: cannot be read as {format}", e) from e


def unforeseen(where: str, error: Exception) -> DataError:
    """The message of an exception that no reader should let through."""
    reason = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
    return DataError(f"{where} ({reason}); this was not foreseen, {REPORT}")
