"""Words of messages that depend on a number, and letters that a terminal may not have."""

from __future__ import annotations

import io
import sys
from contextlib import suppress


def counted(number: int, noun: str) -> str:
    """The number and the noun: "1 run", "1204 frames", "2 processes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def print_in_any_locale() -> None:
    """Have what is printed show ? for what the locale's encoding lacks (→, é), in place of an error."""
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            with suppress(OSError):  # a file whose descriptor has become a terminal since cannot seek
                out.reconfigure(errors="replace")
