"""`stamo` commands forked off a process that has imported everything: what a start imports takes longer than a toy run.

`python -m tests.warm` reads a request a line: {"arguments": [...], "program": file or "", "environment": {...},
"stdout": file, "stderr": file, "folder": working directory}. It answers with {"pid": ...} once the command runs, and
{"pid": ..., "code": ...} when it has ended. The ranks that a command starts are forked off it, too; apart from that it
does what `python -m stamo_dist.cli` does, or `python PROGRAM`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
#: The commands that import torch.
COMMANDS = ("train", "encode", "eval", "export", "plan")
_PR_SET_PDEATHSIG = 1
#: Variables of the tests' process that change nothing: pytest's own, and what libraries set in it for themselves.
_PASSING = {
    "PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "FSDP_CPU_RAM_EFFICIENT_LOADING", "MUJOCO_GL",
    "LIBERO_CONFIG_PATH", "PYOPENGL_PLATFORM", "PYGAME_HIDE_SUPPORT_PROMPT",
}  # fmt: skip
#: What the commands import sooner or later; the last two when DeepSpeed builds its engine.
MODULES = (
    "stamo_dist.distributed.engine", "deepspeed", "stamo_dist.train", "stamo_dist.encode.run",
    "stamo_dist.tasks.tokenizer", "stamo_dist.tasks.vae", "stamo_dist.tasks.policy", "stamo_dist.cli.app",
    "stamo_dist.recipe.load", "stamo_dist.evaluate.rollout", "torchmetrics.functional.image",
    "torch.utils.cpp_extension", "torch._inductor.compile_fx",
)  # fmt: skip


class Started:
    """A command that runs; has what is used of `subprocess.Popen`. Its `pid` is the launcher's, or its only rank's."""

    def __init__(self, pid: int, stdout: Path):
        self.pid, self.stdout, self.returncode = pid, stdout, None
        self._ended = threading.Event()

    returncode: int | None

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"stamo, see {self.stdout}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """Starts commands in `environment`; the process that they are forked off starts with the first."""

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self._folder, self._environment, self._count = folder, dict(environment), 0
        self._environment.pop("PYTEST_CURRENT_TEST", None)
        self._server: subprocess.Popen[str] | None = None
        self._running: dict[int, Started] = {}
        self._begun: queue.SimpleQueue[Started | None] = queue.SimpleQueue()

    def fits(self, arguments: Sequence[str]) -> bool:
        """Whether a fork does what a process of its own would: what is imported may have read the environment."""
        return arguments[0] in COMMANDS and _lasting(os.environ) == _lasting(self._environment)

    def start(
        self, *arguments: object, program: Path | None = None, environment: Mapping[str, str] | None = None,
        stdout: Path | None = None, stderr: Path | None = None, folder: Path = ROOT,
    ) -> Started:  # fmt: skip
        """Run `stamo ARGUMENTS`; both streams go to `stdout`, or each to its file.

        `program`: A Python file that is run in place of `stamo`.
        `environment`: Variables that are read when they are needed, not by what is imported.
        `folder`: The working directory.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.warm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                bufsize=1, cwd=ROOT, env=self._environment, start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=self._listen, args=(self._server.stdout,), daemon=True).start()
        self._count += 1
        out = stdout or self._folder / f"{self._count}.out"
        out.touch()
        request = {
            "arguments": [str(a) for a in arguments], "program": str(program or ""),
            "environment": dict(environment or {}), "stdout": str(out), "stderr": str(stderr or out),
            "folder": str(folder),
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        started = self._begun.get()
        assert started is not None, "the process that commands are forked off has ended"
        started.stdout = out
        return started

    def run(
        self, *arguments: object, program: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run`."""
        out, error = (self._folder / f"{self._count + 1}.{name}" for name in ("stdout", "stderr"))
        started = self.start(*arguments, program=program, stdout=out, stderr=error)
        try:
            code = started.wait(timeout)
        finally:
            started.kill()
        return subprocess.CompletedProcess(list(map(str, arguments)), code, out.read_text(), error.read_text())

    def stamo(self, *arguments: object, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the `stamo` command in a process of its own, as a user does; what imports torch is forked."""
        words = list(map(str, arguments))
        if self.fits(words):
            result = self.run(*words, timeout=timeout)
        else:
            command = [sys.executable, "-m", "stamo_dist.cli", *words]
            result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
        if check:
            assert not result.returncode, (
                f"stamo {' '.join(words)} exited {result.returncode}\n{result.stdout}\n{result.stderr}"
            )
        return result

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(60)

    def _listen(self, answers: IO[str]) -> None:
        for line in answers:
            answer = json.loads(line)
            if "code" in answer:
                self._running.pop(answer["pid"]).end(answer["code"])
            else:
                self._running[answer["pid"]] = Started(answer["pid"], Path(os.devnull))
                self._begun.put(self._running[answer["pid"]])
        self._begun.put(None)
        for started in self._running.values():
            started.end(-signal.SIGKILL)


def _lasting(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _PASSING}


def _command(arguments: Sequence[str], program: str = "") -> int:
    sys.argv = [program or "stamo", *arguments]
    if program:
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module("stamo_dist.cli", run_name="__main__", alter_sys=True)
    return 0


def _serve(answers: IO[str]) -> None:
    from stamo_dist.chaos.fork_server import Forked, serve
    from stamo_dist.launch import local

    def start_rank(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> Forked:
        def rank() -> int:
            os.environ.update(environment)
            return _command(command[3:])  # after: python -m stamo_dist.cli

        return Forked(rank, output)

    def begin(request: dict[str, Any]) -> Forked:
        def body() -> int:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
                with open(name, "ab" if descriptor else "rb") as file:
                    os.dup2(file.fileno(), descriptor)
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            return _command(request["arguments"], request["program"])

        return Forked(body)

    local.launch_local = functools.partial(local.launch_local, start=start_rank)
    serve(begin, answers)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for module in MODULES:
        importlib.import_module(module)
    _serve(pipe)
    os._exit(0)  # what was imported takes long to be taken down
