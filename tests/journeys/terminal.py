"""`stamo` commands as one types them: into a file, or in a terminal of so many columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from warm import Warm


class Terminal:
    """A terminal that keeps what is written to it."""

    def __init__(self, columns: int):
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.path, self._said = Path(os.ttyname(self._slave)), bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._said += os.read(self._master, 1 << 16)
            except OSError:  # its other end is closed
                return

    def close(self) -> str:
        os.close(self._slave)
        self._reader.join(10)
        os.close(self._master)
        return self._said.decode(errors="replace")


class Shell:
    """Runs commands in a folder; keeps how long each took, in `seconds`."""

    def __init__(self, warm: Warm, folder: Path):
        self._warm, self._folder, self.seconds = warm, folder, dict[str, float]()

    def __call__(
        self, where: Path, words: Sequence[str], *, columns: int | None = None, check: bool = False, timeout: float = 120
    ) -> tuple[int, str]:
        """(exit code, what it said) of `stamo WORDS`; in a terminal of so many columns, or into a file.

        `check`: It must end with 0, without a traceback, and have written a table in whole.
        """
        began, said = time.monotonic(), self._folder / f"{len(self.seconds)}.out"
        terminal = Terminal(columns) if columns else None
        started = self._warm.start(
            *words, stdout=terminal.path if terminal else said, folder=where,
            environment={"TERM": "xterm-256color"} if terminal else {"COLUMNS": "80"},
        )  # fmt: skip
        try:
            code = started.wait(timeout)
        finally:
            started.kill()
            text = terminal.close() if terminal else said.read_text()
        self.seconds[f"{len(self.seconds)} {' '.join(words)}"] = time.monotonic() - began
        if check:
            told = f"in {where}:\nstamo {' '.join(words)}\nexited {code}:\n{text}"
            assert not code, told
            assert "Traceback" not in text, told
            assert not re.search(r"[│┃].*…", text), f"a table is cut {told}"
            assert terminal or not re.search(r"[\r\x1b]", text), f"written for a terminal {told}"
        return code, text
