"""Training a recipe as jobs of Slurm: undisturbed, then under faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.chaos.faults import Kind
from stamo_dist.chaos.harness import Harness, Plan
from stamo_dist.chaos.job_faults import Nobody, Operator, kinds
from stamo_dist.chaos.job_trial import JobTrial
from stamo_dist.chaos.starts import Spawner
from stamo_dist.chaos.trial import FaultSchedule, Pace
from stamo_dist.errors import RunError
from stamo_dist.launch import submit
from stamo_dist.launch.profile import load_profile


@dataclass(frozen=True)
class Site:
    """Where the jobs run: a profile, as `stamo submit` takes it, and who does what users cannot do."""

    profile: str
    operator: Operator = Nobody()  # noqa: RUF009  it has no state

    def processes(self) -> int:
        """Of a job.

        Raises:
            StamoError: The profile is wrong, of this machine, or leaves the number of nodes open.
        """
        _, profile = load_profile(self.profile)
        if profile.backend == "local":
            raise RunError(f"--slurm {self.profile}: is of this machine; without --slurm it is tried")
        least, most = profile.node_range(profile.nodes)
        if least != most:
            raise RunError(
                f"--slurm {self.profile}: asks for {least} to {most} nodes, and every step is compared with one on as "
                "many; leave out min_nodes and max_nodes"
            )
        return profile.nodes * profile.processes


class JobHarness(Harness):
    """`Harness` whose trainings, those without faults too, are jobs."""

    where = " on Slurm"

    def __init__(self, plan: Plan, site: Site, say: Callable[[str], None]):
        self._site = site
        super().__init__(plan, Spawner(), say)

    def _kinds(self, strategy: str) -> Sequence[Kind]:
        return kinds(self._site.operator)

    def _trial(
        self, strategy: str, folder: Path, sizes: Sequence[int], schedule: FaultSchedule, pace: Pace
    ) -> JobTrial:
        order = submit.plan(self._plan.recipe, self._site.profile, overrides=self._settings(strategy, folder))
        return JobTrial(order, schedule, self._site.operator, patience=self._plan.patience, say=self._say)
