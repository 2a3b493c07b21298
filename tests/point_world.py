"""A benchmark of its own: a point that moves over a picture. Trial n is solved by n + 1 steps, whatever they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from toy import toy_frame

from stamo_dist.errors import DataError
from stamo_dist.evaluate.simulators import Observation, Setting
from stamo_dist.extras import how_to_install


class PointSimulator:
    max_steps = 5

    def __init__(self, task: str, setting: Setting):
        self._task, self._setting = task, setting
        if task == "suite/broken":
            raise DataError("the simulator broke; pip install it anew")

    def reset(self, trial: int) -> Observation:
        self._trial, self._steps = trial, 0
        return self.observe()

    def solve(self, trial: int) -> int | None:
        return trial + 1

    def step(self, action: np.ndarray) -> bool:
        assert action.shape == (3,)
        assert np.isfinite(action).all()
        self._steps += 1
        return self._steps > self._trial

    def observe(self) -> Observation:
        size = self._setting.size
        images = tuple(toy_frame(self._trial, self._steps, size) for _ in self._setting.cameras)
        goal = toy_frame(self._trial, self._trial + 1, size) if self._setting.goals else None
        return Observation(images, np.zeros(2), "move the square", goal)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class PointBenchmarks:
    def checkable(self, benchmark: str) -> bool:
        return True

    def resolve(self, benchmark: str, tasks: Sequence[str], setting: Setting) -> list[str]:
        if benchmark != "toy":
            raise DataError(f"{benchmark} is not installed: {how_to_install('sim')}")
        return list(tasks)

    def open(self, benchmark: str, task: str, setting: Setting) -> PointSimulator:
        return PointSimulator(task, setting)

    def instruction(self, benchmark: str, task: str) -> str:
        return f"move the square of {task}"

    def default_processes(self, benchmark: str) -> int:
        return 2

    def default_camera(self, benchmark: str) -> str:
        return "front"

    def trials(self, benchmark: str) -> int | None:
        return 9


def as_simulators(folder: Path) -> str:
    """A PYTHONPATH under which every `stamo` process has this world for its simulators."""
    (folder / "sitecustomize.py").write_text(
        "import data_tools.simulators.catalogue as catalogue\n"
        "from point_world import PointBenchmarks\n"
        "catalogue.InstalledBenchmarks = PointBenchmarks\n"
    )
    here = Path(__file__).parent
    return os.pathsep.join(map(str, (folder, here, here.parent)))
