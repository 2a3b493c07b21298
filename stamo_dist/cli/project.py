"""`stamo init | demo`: a project of one's own, and the demonstration."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.demo import DEMO, POLICY
from stamo_dist.errors import StamoError
from stamo_dist.exit_codes import EXIT_TERMINATED

_TOY = "raw/toy"
_KILLED_AFTER = 90.0  # seconds
_GONE = 10.0  # seconds for killed processes to be gone


def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the project; may exist.")]) -> None:
    """Write a project of your own: recipes that run, Slurm profiles, toy data, .gitignore, a README with five commands.

    It replaces no file.

    Example: stamo init my_project
    """
    from data_tools.simulators.drawn import TASK, write_drawn
    from stamo_dist.project import write_project

    left = write_project(folder)
    toy = folder / _TOY / f"{TASK}_demo.hdf5"
    if not toy.exists():
        write_drawn(toy, episodes=16, size=64)
    here = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}; "
    if left:
        print(f"{folder}: left as they were: {', '.join(left)}")
    if ".gitignore" in left:
        print(f"{folder}: let .gitignore have raw/, shards/ and runs/")
    readme = "STAMO.md" if "README.md" in left else "README.md"
    print(f"{folder}: written; {readme} has five commands. The first two:")
    print(f"  {here}stamo data convert libero {_TOY} shards/toy --size 64 --val-fraction 0.2")
    print("  stamo train recipes/vae.yaml --nproc 2")


def demo(
    policy: Annotated[
        bool, typer.Option("--policy", help="After it: a policy for four simulated tasks, about 22 minutes more.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and stop.")] = False,
) -> None:
    """Run the demonstration in demo/: simulate two sources, shard, mix, train, kill, go on, measure; about 10 minutes.

    Run it again to go on. It needs the simulators (the extra [sim]) and headless OpenGL, no GPU and no checkout.

    Example: stamo demo
    """
    with _Commands() as commands:
        for line in (POLICY if policy else DEMO).splitlines():
            killed, words = line.startswith("kill "), shlex.split(line.removeprefix("kill "))
            print(f"$ {f'timeout --signal=KILL {_KILLED_AFTER:.0f} ' * killed}stamo {shlex.join(words)}", flush=True)
            if dry_run:
                continue
            command = [sys.executable, "-m", "stamo_dist.cli", *words]
            if killed:
                commands.run_and_kill(command)
            elif code := commands.run(command):
                again = "stamo demo --policy" if policy else "stamo demo"
                raise StamoError(f"`stamo {words[0]}` ended with exit code {code}; `{again}` goes on from there")


class _Commands:
    """Runs one after the other; inside, SIGTERM ends the one that runs, which may save, and then this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __enter__(self) -> _Commands:
        self._before = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def run(self, command: list[str]) -> int:
        """Its exit code. Ctrl-C, which it hears of too, is waited for."""
        process = self._start(command)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        self._leave_if_asked()
        return code

    def run_and_kill(self, command: list[str]) -> None:
        """Start a training, and kill all its processes as a cluster would; it may finish before."""
        process = self._start(command, session=True)
        try:
            process.wait(_KILLED_AFTER)
        except subprocess.TimeoutExpired:
            _kill_tree(process)
            print("killed, as was meant; the same command goes on from its last checkpoint:", flush=True)
        finally:
            if process.poll() is None:
                _kill_tree(process)
        self._leave_if_asked()

    def _start(self, command: list[str], *, session: bool = False) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(command, start_new_session=session)
        if self._asked:  # while it was started
            process.terminate()
        return process

    def _end(self, *_: object) -> None:
        self._asked = True
        if self._process is not None:
            self._process.terminate()

    def _leave_if_asked(self) -> None:
        if self._asked:
            print(f"ended by SIGTERM; `stamo {shlex.join(sys.argv[1:])}` goes on", file=sys.stderr)
            raise SystemExit(EXIT_TERMINATED)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all below it, none of which says anything from then on.

    Ranks have sessions of their own, and would save and leave when the launcher is killed: so all are halted first.
    """
    import psutil

    everyone = [psutil.Process(process.pid)]
    with suppress(psutil.NoSuchProcess):
        everyone[0].suspend()
        everyone += everyone[0].children(recursive=True)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
    process.wait()
    psutil.wait_procs(everyone[1:], timeout=_GONE)
