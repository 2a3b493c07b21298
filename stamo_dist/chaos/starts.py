"""Starting `stamo` commands, as a user does or by forking from a process with all imports; their process trees."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

#: Modules that a training and a conversion import.
MODULES = (
    "stamo_dist.distributed.engine",
    "deepspeed",
    "stamo_dist.train",
    "stamo_dist.tasks.tokenizer",
    "stamo_dist.tasks.vae",
)
_WORKER = "stamo_dist.data.worker"


class Start(Protocol):
    """One running command."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""


class Starter(Protocol):
    def start(self, arguments: Sequence[str], output: Path, processes: int = 0, run: Path | None = None) -> Start:
        """Run `stamo ARGUMENTS` in a session of its own; `processes`: ranks of a training, `run`: their folder."""

    def close(self) -> None: ...


class Spawner:
    """Starts commands as a user does."""

    def start(self, arguments: Sequence[str], output: Path, processes: int = 0, run: Path | None = None) -> Start:
        ranks = ["--nproc", str(processes)] if processes > 1 else []
        command = [sys.executable, "-m", "stamo_dist.cli", *arguments, *ranks]
        with output.open("ab") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)

    def close(self) -> None:
        pass


class ForkServer:
    """Forks commands off one process that has imported `modules`."""

    def __init__(self, modules: Sequence[str] = MODULES):
        self._codes: dict[int, int] = {}
        self._begun: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        command, pipe = [sys.executable, "-m", "stamo_dist.chaos.fork_server", *modules], subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, start_new_session=True)
        self._answers = threading.Thread(target=self._listen, name="fork server", daemon=True)
        self._answers.start()

    def start(self, arguments: Sequence[str], output: Path, processes: int = 0, run: Path | None = None) -> Start:
        request = {"arguments": list(arguments), "processes": processes, "run": str(run), "output": str(output)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        pid = self._begun.get()
        if pid is None:
            raise RuntimeError("the process that starts are forked off has ended; see its output above")
        return _Forked(self, pid)

    def code(self, pid: int) -> int | None:
        return self._codes.get(pid)

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            answer = json.loads(line)
            if "code" in answer:
                self._codes[answer["pid"]] = answer["code"]
            else:
                self._begun.put(answer["pid"])
        self._begun.put(None)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._answers.join()


class _Forked:
    def __init__(self, server: ForkServer, pid: int):
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        return self._server.code(self.pid)


class Tree:
    """The processes of one start: launcher, ranks, loader workers, including ranks that lost their launcher."""

    def __init__(self, start: Start, processes: int):
        self._start, self._size = start, processes
        self._ranks: list[psutil.Process] = []
        self.launcher: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):
            self.launcher = psutil.Process(start.pid)

    def ranks(self) -> list[psutil.Process]:
        """The running ranks, in order; with one process the launcher is the rank."""
        if self.launcher is None:
            return []
        if self._size == 1:
            return [self.launcher] if running(self.launcher) else []
        if len(self._ranks) < self._size:
            with suppress(psutil.NoSuchProcess):
                self._ranks = sorted(self.launcher.children(), key=lambda p: (p.create_time(), p.pid))
        return [p for p in self._ranks if running(p)]

    def workers(self) -> list[psutil.Process]:
        found = []
        for rank in self.ranks():
            with suppress(psutil.NoSuchProcess):
                found += [p for p in rank.children() if _WORKER in p.cmdline()]
        return found

    @property
    def gone(self) -> bool:
        """Whether all processes have ended."""
        return self._start.poll() is not None and not self.ranks()

    def kill(self) -> None:
        """Kill all processes at once."""
        everyone = [*([self.launcher] if self.launcher else []), *self.ranks()]
        for process in list(everyone):
            with suppress(psutil.NoSuchProcess):
                everyone += process.children(recursive=True)
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        while not self.gone:
            time.sleep(0.01)


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
