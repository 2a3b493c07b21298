"""Ranks of `stamo train`, forked from a process that has imported everything: the import takes longer than a toy run.

`python -m tests.forked SHARED` reads the fields of a `Call` a line and answers with those of an `End`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = 124
_GRACE = 20.0  # seconds for the other ranks once one has failed, and for what they started to end
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Call:
    """`stamo ARGUMENTS` as so many ranks, which write to `folder`/RANK."""

    processes: int
    arguments: list[str]
    folder: str
    compare: bool = False
    stop: str | None = None  # metrics.jsonl of the run; all ranks get SIGUSR1 once it has `stop_lines` lines
    stop_lines: int = 0
    timeout: float = 600.0


@dataclass(frozen=True)
class End:
    """What became of a call: the first exit code that is not 0, and the commands of what it left running."""

    code: int
    left: list[str]


class Ranks:
    """Calls give (exit code, rank 0's output); one after the other.

    Attributes:
        shared: Folder in memory in which the ranks of a start share what they read; other tests' starts use another.
    """

    def __init__(self, folder: Path):
        self._folder, self._calls = folder, 0
        self.shared = Path(tempfile.mkdtemp(prefix="stamo-ranks-", dir="/dev/shm"))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(self.shared)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def __call__(
        self, processes: int, *arguments: object, check: bool = True, compare: bool = False,
        stop: tuple[Path, int] | None = None, timeout: float = 600.0,
    ) -> tuple[int, str]:  # fmt: skip
        """Run `stamo ARGUMENTS` as `processes` ranks, of which nothing may be left running.

        `compare`: every collective of a rank is compared with the others', and one that only some call ends the run
        with its name. Not for ddp, in which this mode of torch crashes.
        `stop`: a metrics.jsonl, and with how many lines of it the ranks get SIGUSR1.
        `timeout`: Seconds after which all are killed, and the code is `TIMED_OUT`.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        folder = self._folder / str(self._calls)
        folder.mkdir()
        self._calls += 1
        where, lines = stop or (None, 0)
        call = Call(
            processes, [str(a) for a in arguments], str(folder), compare, str(where) if where else None, lines, timeout
        )
        self._server.stdin.write(json.dumps(asdict(call)) + "\n")
        end = End(**json.loads(self._server.stdout.readline()))
        outputs = [(folder / str(rank)).read_text() for rank in range(processes)]
        told = f"stamo {' '.join(call.arguments)} on {processes} exited {end.code}\n" + "\n".join(outputs)
        assert not end.left, f"left running: {end.left}\n{told}"
        assert not (check and end.code), told
        return end.code, outputs[0]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)
        shutil.rmtree(self.shared)


def _rank(rank: int, processes: int, port: int, arguments: list[str], output: Path, compare: bool) -> NoReturn:
    import torch.distributed as dist

    from stamo_dist import cli

    dist.set_debug_level(dist.DebugLevel.DETAIL if compare else dist.DebugLevel.OFF)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), STAMO_LAUNCHED=str(os.getppid()),
    )  # fmt: skip
    sys.argv = ["stamo", *arguments]
    code = 1
    try:
        cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(call: Call) -> int:
    from stamo_dist.distributed.rank import ReservedPort

    reserved = ReservedPort()
    port = reserved.number
    ranks = []
    for rank in range(call.processes):
        pid = os.fork()
        if pid == 0:
            _rank(rank, call.processes, port, call.arguments, Path(call.folder) / str(rank), call.compare)
        ranks.append(pid)
    first, deadline, stop = 0, time.monotonic() + call.timeout, Path(call.stop) if call.stop else None
    while ranks:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not first:
                    first, deadline = code, time.monotonic() + _GRACE
        if stop and stop.exists() and stop.read_bytes().count(b"\n") >= call.stop_lines:
            stop = None
            for pid in ranks:
                os.kill(pid, signal.SIGUSR1)
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            first, deadline = first or TIMED_OUT, float("inf")
        time.sleep(0.01)
    reserved.release()
    return first


def _left() -> list[str]:
    """The commands of what the ranks started and did not end; it is killed."""
    import psutil

    here, deadline = psutil.Process(), time.monotonic() + _GRACE
    while True:
        left = {p.pid: p for p in here.children(recursive=True)}
        for pid in list(left):
            if left[pid].status() == psutil.STATUS_ZOMBIE and left[pid].ppid() == here.pid:
                os.waitpid(pid, 0)
                del left[pid]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    names = [" ".join(p.cmdline()) for p in left.values()]
    for p in left.values():
        p.kill()
    return names


def _serve(answers: IO[str], shared: str) -> None:
    from stamo_dist.data import node
    from tests.warm import MODULES

    for module in MODULES:
        importlib.import_module(module)
    node.PLACES = (shared, *node.PLACES[1:])
    gc.freeze()  # as `stamo_dist.chaos.fork_server` does
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a rank leaves behind becomes this process's child
    for line in sys.stdin:
        code = _run(Call(**json.loads(line)))
        print(json.dumps(asdict(End(code, _left()))), file=answers, flush=True)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    _serve(pipe, sys.argv[1])
