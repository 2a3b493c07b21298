"""The simulators for `stamo eval plan` and `rollout`; heavy packages are imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from stamo_dist.evaluate.simulators import Setting, Simulator

#: Number of initial states of each LIBERO task.
_LIBERO_TRIALS = 50


@dataclass(frozen=True)
class InstalledBenchmarks:
    """LIBERO, Meta-World and ManiSkill, as installed; a `stamo_dist.evaluate.simulators.SimulatorCatalogue`."""

    def checkable(self, benchmark: str) -> bool:
        from importlib.util import find_spec

        from data_tools.simulators.tasks import PACKAGES, check_graphics

        if benchmark in PACKAGES and find_spec(PACKAGES[benchmark]) is None:
            return False
        try:
            check_graphics(benchmark)
        except DataError:
            return False
        return True

    def resolve(self, benchmark: str, tasks: Sequence[str], setting: Setting) -> list[str]:
        from data_tools.simulators.tasks import check_request

        return check_request(benchmark, tasks, setting.cameras, episodes=1, size=setting.size)

    def open(self, benchmark: str, task: str, setting: Setting) -> Simulator:
        from data_tools.simulators.closed_loop import open_task

        return open_task(benchmark, task, setting)

    def instruction(self, benchmark: str, task: str) -> str:
        from data_tools.simulators.tasks import instruction_of

        return instruction_of(benchmark, task)

    def default_processes(self, benchmark: str) -> int:
        from data_tools.simulators.tasks import default_processes

        return default_processes(benchmark)

    def default_camera(self, benchmark: str) -> str:
        from data_tools.simulators.tasks import DEFAULT_CAMERAS

        return DEFAULT_CAMERAS.get(benchmark, [""])[0]

    def trials(self, benchmark: str) -> int | None:
        return _LIBERO_TRIALS if benchmark == "libero" else None
