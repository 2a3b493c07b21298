"""Ranks of `stamo train`, forked from a process that has imported everything: the import takes longer than a toy run.

`python -m tests.forked` reads a JSON list a line,
[processes, arguments, output folder, compare], and answers with the exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
_GRACE = 20.0  # seconds for the other ranks once one has failed


class Ranks:
    """Calls give (exit code, rank 0's output); one after the other."""

    def __init__(self, folder: Path):
        self._folder, self._calls = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            bufsize=1,
        )  # fmt: skip

    def __call__(
        self, processes: int, *arguments: object, check: bool = True, compare: bool = False
    ) -> tuple[int, str]:
        """Run `stamo ARGUMENTS` as `processes` ranks.

        `compare`: every collective of a rank is compared with the others', and one that only some call ends the run
        with its name. Not for ddp, in which this mode of torch crashes.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        folder = self._folder / str(self._calls)
        folder.mkdir()
        self._calls += 1
        self._server.stdin.write(json.dumps([processes, [str(a) for a in arguments], str(folder), compare]) + "\n")
        code = int(self._server.stdout.readline())
        outputs = [(folder / str(rank)).read_text() for rank in range(processes)]
        assert not (check and code), f"stamo {arguments} on {processes} exited {code}\n" + "\n".join(outputs)
        return code, outputs[0]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


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


def _run(processes: int, arguments: list[str], folder: Path, compare: bool) -> int:
    from stamo_dist.engine.world import free_port

    port = free_port()
    ranks = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _rank(rank, processes, port, arguments, folder / str(rank), compare)
        ranks.append(pid)
    first, deadline = 0, float("inf")
    while ranks:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not first:
                    first, deadline = code, time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return first


def _serve(answers: IO[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    import stamo_dist.tasks.tokenizer
    import stamo_dist.train  # noqa: F401

    for line in sys.stdin:
        processes, arguments, folder, compare = json.loads(line)
        print(_run(processes, arguments, Path(folder), compare), file=answers, flush=True)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    _serve(pipe)
