"""`python -m stamo_dist.chaos.fork_server MODULE...`: imports modules once and forks `stamo` commands off itself.

A start by fork takes a tenth of the time of one that imports everything, and runs the same code. A line of
standard input requests one: {"arguments": [...], "processes": 0 or ranks, "run": folder, "output": file}. A line of
standard output says {"pid": ...} once it runs, and {"pid": ..., "code": ...} when it has ended.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from stamo_dist.launch.local import launch_local

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Forked:
    """A forked process that runs `body` and exits with its value; has the needed methods of `subprocess.Popen`."""

    def __init__(self, body: Callable[[], int], output: IO[bytes] | None = None):
        self.returncode: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            for number in _SIGNALS:  # the child must not inherit the parent's handlers
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _run(body, output)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(body: Callable[[], int], output: IO[bytes] | None) -> NoReturn:
    code = 1
    try:
        os.setsid()
        if output is not None:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        code = body()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(arguments: Sequence[str]) -> int:
    sys.argv = ["stamo", *arguments]
    runpy.run_module("stamo_dist.cli", run_name="__main__", alter_sys=True)
    return 0


def _begin(request: dict[str, Any]) -> Forked:
    def body() -> int:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if request["processes"] > 1:

            def start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> Forked:
                def rank() -> int:
                    os.environ.update(environment)
                    return _command(request["arguments"])

                return Forked(rank, output)

            return launch_local(request["arguments"], request["processes"], Path(request["run"]), start=start)
        return _command(request["arguments"])

    with open(request["output"], "ab") as output:
        return Forked(body, output)


def serve(begin: Callable[[dict[str, Any]], Forked], answers: IO[str]) -> None:
    """Start what standard input asks for, a JSON request a line, until it ends; `begin` forks one request."""

    def answer(**values: int) -> None:
        print(json.dumps(values), file=answers, flush=True)

    gc.freeze()  # a child that looked for garbage among what was imported would copy all of it
    running: list[Forked] = []
    while True:
        if select.select([0], [], [], 0.01)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            running.append(begin(json.loads(line)))
            answer(pid=running[-1].pid)
        for child in list(running):
            if (code := child.poll()) is not None:
                running.remove(child)
                answer(pid=child.pid, code=code)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout carries answers only, so what imports print goes to stderr
    for module in sys.argv[1:]:
        importlib.import_module(module)
    serve(_begin, pipe)
