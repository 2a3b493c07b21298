"""What `stamo doctor` says: one line each, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

Level = Literal["error", "warning", "note", "fine"]
_MARK: dict[Level, tuple[str, str]] = {
    "error": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "cyan"), "fine": ("✓", "green"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. All but `fine` ones have a fix."""

    level: Level
    area: str  # which part of the report it belongs to
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.level == "fine" or self.fix, f"no fix: {self.what}"


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings by area, and how many there are of each kind."""
    for area in dict.fromkeys(f.area for f in findings):
        console.print(Text(area, style="bold"))
        for f in findings:
            if f.area == area:
                mark, style = _MARK[f.level]
                console.print(Text.assemble("  ", (mark, style), " ", f.what), soft_wrap=True)
                if f.fix:
                    console.print(Text.assemble("    → ", (f.fix, "italic")), soft_wrap=True)
    count = {level: sum(f.level == level for f in findings) for level in _MARK}
    plural = {"error": "errors", "warning": "warnings", "note": "notes", "fine": "fine"}
    counted = [f"{n} {level if n == 1 else plural[level]}" for level, n in count.items() if n]
    console.print(Text(", ".join(counted), style="bold"))


def failed(findings: Sequence[Finding]) -> bool:
    return any(f.level == "error" for f in findings)
