"""`stamo` commands as one types them: into a file, or in a terminal of so many columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from warm import Started, Warm

_LONGEST = 600.0  # seconds, of which an extension of DeepSpeed that is not yet compiled takes most


def plain(said: str) -> str:
    """Without what colours it and moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)


class Terminal:
    """A terminal that keeps what is written to it."""

    def __init__(self, columns: int):
        self.columns = columns
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
    """Runs commands in a folder."""

    def __init__(self, warm: Warm, folder: Path):
        self._warm, self._folder, self._count = warm, folder, 0

    def __call__(self, where: Path, words: Sequence[str], *, columns: int | None = None, code: int = 0) -> str:
        """What `stamo WORDS` says in a terminal of so many columns, or into a file.

        It must end with `code`, without a traceback, cut no table, and write nothing into a file that only a terminal
        understands.
        """
        terminal = Terminal(columns) if columns else None
        try:
            with self.started(where, words, terminal) as started:
                ended = started.wait(_LONGEST)
        finally:
            said = terminal.close() if terminal else started.stdout.read_text()
        told = f"in {where}:\nstamo {' '.join(words)}\nexited {ended}:\n{said}"
        assert ended == code, told
        assert "Traceback" not in said, told
        rows = re.findall(r".*[│┃].*", plain(said))
        assert not [row for row in rows if "…" in row or len(row.strip()) > (columns or len(row))], (
            f"a table is cut {told}"
        )
        assert terminal or not re.search(r"[\r\x1b]", said), f"written for a terminal {told}"
        return said

    @contextmanager
    def started(self, where: Path, words: Sequence[str], terminal: Terminal | None = None) -> Iterator[Started]:
        """`stamo WORDS`, which is killed at the end if it still runs."""
        self._count += 1
        # COLUMNS: rich asks it before the terminal, and pytest's workers may have one.
        environment = {"TERM": "xterm-256color", "COLUMNS": str(terminal.columns)} if terminal else {"COLUMNS": "80"}
        if "--dry-run" in words:
            environment["HF_HUB_OFFLINE"] = "0"  # weights that a cluster has need not be here
        started = self._warm.start(
            *words, folder=where, stdout=terminal.path if terminal else self._folder / f"{self._count}.out",
            environment=environment,
        )  # fmt: skip
        try:
            yield started
        finally:
            started.kill()
