"""`stamo data convert`, killed and run again until it is done, must give the same bytes as an undisturbed one."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from stamo_dist.chaos.faults import RANK, Fault, strike
from stamo_dist.chaos.starts import Start, Starter, Tree
from stamo_dist.chaos.trial import Injected, Outcome

CONVERTER, CONVERTING = "the converter", "converting"
_EPISODES, _LENGTH, _SIDE = 300, 60, 16
_SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")
_MOST = 3  # faults of one conversion


def make_source(path: Path) -> Path:
    """Write a small dataset of noise in LIBERO's layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(image_timing="before", image_orientation="upright", action_convention="noise", rate_hz=10.0)
        for episode in range(_EPISODES):
            demo = data.create_group(f"demo_{episode}")
            demo["obs/front_rgb"] = rng.integers(0, 255, (_LENGTH, _SIDE, _SIDE, 3), np.uint8)
            demo["actions"] = rng.normal(size=(_LENGTH, 2))
            demo["obs/ee_states"] = rng.normal(size=(_LENGTH, 6))
            demo["obs/gripper_states"] = rng.normal(size=(_LENGTH, 2))
    return path


class Conversion:
    """Args:
    starter: Starts the converters.
    folder: Working folder; exists and is empty.
    rng: Draws the faults.
    patience: Seconds after which a converter counts as hung.
    say: Called with a line for each fault.
    """

    def __init__(
        self, starter: Starter, folder: Path, rng: random.Random, *, patience: float, say: Callable[[str], None]
    ):
        self._starter, self._folder, self._rng = starter, folder, rng
        self._patience, self._say = patience, say
        self._source, self._log = make_source(folder / "source.hdf5"), folder / "convert.log"
        self._seconds = 0.0  # seconds that a conversion takes once it writes
        self._tree: Tree | None = None
        self.outcome = Outcome()

    def run(self, faults: int) -> Outcome:
        """Convert undisturbed, then under this many faults, and compare the results."""
        try:
            self._convert_alone("untouched")
            expected = _content(self._folder / "untouched")
            while len(self.outcome.faults) < faults and not self.outcome.problems:
                for _ in range(min(faults - len(self.outcome.faults), self._rng.randint(1, _MOST))):
                    self._convert_under_fault("converted")
                self._convert_alone("converted")
                if not self.outcome.problems and _content(self._folder / "converted") != expected:
                    self.outcome.problems.append(
                        f"{self._folder}/converted: is not what an untouched conversion writes"
                    )
                elif not self.outcome.problems:
                    shutil.rmtree(self._folder / "converted")
        finally:
            if self._tree is not None:
                self._tree.kill()
        self.outcome.finished = not self.outcome.problems
        return self.outcome

    def _start(self, name: str) -> Start:
        self.outcome.starts += 1
        arguments = ["data", "convert", "libero", str(self._source), str(self._folder / name), "--size", str(_SIDE)]
        start = self._starter.start([*arguments, "--name", "noise", "--processes", "1"], self._log)
        self._tree = Tree(start, 1)
        return start

    def _convert_alone(self, name: str) -> None:
        start = self._start(name)
        self._until(start, (self._folder / f".{name}.partial").exists)
        began = time.monotonic()
        self._until(start, lambda: False)
        self._seconds = self._seconds or time.monotonic() - began
        left = [p.name for p in self._folder.glob(f".{name}*")]
        if start.poll() != 0 or left:
            what = f"left {', '.join(left)} behind" if left else f"ended with code {start.poll()}"
            tail = self._log.read_text(errors="replace").splitlines()[-12:]
            self.outcome.problems.append(
                "\n    ".join([f"{self._log}: a conversion that was left alone {what}", *tail])
            )

    def _convert_under_fault(self, name: str) -> None:
        start = self._start(name)
        self._until(start, (self._folder / f".{name}.partial").exists)
        deadline = time.monotonic() + self._rng.random() * self._seconds
        self._until(start, lambda: time.monotonic() >= deadline)
        if start.poll() is not None:
            return
        fault = Fault(RANK, self._rng.choice(_SIGNALS), CONVERTING, 0, 0)
        assert self._tree is not None
        if strike(fault, self._tree):
            injected = Injected(CONVERTER, fault.what, CONVERTING, 0)
            self.outcome.faults.append(injected)
            self._until(start, lambda: False)
            injected.code = start.poll()
            self._say(f"conversion: {injected}: code {injected.code}")

    def _until(self, start: Start, condition: Callable[[], bool]) -> None:
        """Wait for the condition or the end of the conversion."""
        deadline = time.monotonic() + self._patience
        while start.poll() is None and not condition():
            if time.monotonic() > deadline:
                self.outcome.problems.append(f"{self._log}: a conversion hung for {self._patience:g} s")
                assert self._tree is not None
                self._tree.kill()
            time.sleep(0.002)


def _content(folder: Path) -> dict[str, str]:
    """File below `folder` → digest of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
