"""What the measurements in a simulator have in common: trials that are kept, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stamo_dist.evaluate.closed_loop import Agent, Simulation, TaskTrial, TrialFolder, TrialOutcome, drive
from stamo_dist.evaluate.measurement import Measurement
from stamo_dist.evaluate.simulators import SimulatorCatalogue


@dataclass(kw_only=True)
class SimulatedMeasurement(Measurement):
    """Trials of agents in the simulators of `benchmarks`."""

    benchmarks: SimulatorCatalogue

    def run_trials(
        self,
        what: str,
        agent: Callable[[], Agent | None],
        simulation: Simulation,
        trials: Sequence[TaskTrial],
        store: TrialFolder,
        keep_video: Callable[[TrialOutcome], bool],
    ) -> None:
        """Run those of the trials that `store` lacks; `agent` is only called where there are some.

        Raises:
            DataError: As `drive`.
        """
        there = store.read(trials)
        watched = self.bar.add_task(what, total=len(trials), completed=len(there))
        if missing := [trial for trial in trials if trial not in there]:
            advance = self.bar.advance
            drive(simulation, agent(), missing, store, keep_video=keep_video, done=lambda _: advance(watched))
