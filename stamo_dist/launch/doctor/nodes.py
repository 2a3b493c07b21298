"""Running the probe on every rank: as a short job submitted like a run, or on this machine."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from stamo_dist.launch import slurm, submit
from stamo_dist.launch.doctor.placement import judge_placement
from stamo_dist.launch.doctor.probe import LIMIT, Report, read
from stamo_dist.launch.doctor.verdict import Finding, judge_reports
from stamo_dist.launch.local import Ranks
from stamo_dist.launch.profile import ClusterProfile
from stamo_dist.launch.record import Launch, main_log
from stamo_dist.words import counted

_TIME = "00:02:00"
_AREA = "Nodes"
_POLL = 0.5  # seconds


def here(folder: Path, processes: int, paths: Sequence[str], wandb: str) -> Iterator[Finding]:
    """Probe this machine with this many processes; `folder` gets their reports and logs and is removed."""
    reports = folder / "reports"
    reports.mkdir(parents=True)
    command = [sys.executable, "-m", "stamo_dist.cli", *_arguments(reports, paths, wandb)]
    main_log(folder).parent.mkdir()
    with main_log(folder).open("ab") as log, Ranks(command, processes, folder, main=log) as ranks:
        ranks.wait()
    yield from _verdict(folder, processes)


def on_cluster(
    folder: Path,
    cluster: str,
    profile: ClusterProfile,
    paths: Sequence[str],
    wandb: str,
    *,
    patience: float,
    say: Callable[[str], None],
) -> Iterator[Finding]:
    """Probe the nodes of a cluster in a job that is submitted as a run is; waits `patience` seconds for it to start.

    `folder` must be shared by the nodes; it gets reports and logs, and is removed if all is well.

    Raises:
        StamoError: Slurm refuses the job.
    """
    small = {"time": _TIME, "signal_delay": 10, "min_nodes": None, "max_nodes": None, "max_restarts": 0, "notify": None}
    profile = profile.model_copy(update=small)
    reports = folder / "reports"
    reports.mkdir(parents=True)
    command, given = _arguments(reports, paths, wandb), profile.model_dump(mode="json")
    launch = Launch("stamo-doctor", str(folder), "", command=command, cluster=cluster, profile=given, max_restarts=0)
    launch = replace(launch, nodes=profile.nodes, processes_per_node=profile.processes)
    job = submit.submit(submit.JobOrder(launch, profile)).job
    assert job is not None, "a submitted job has an id"
    say(f"job {job}: {counted(profile.nodes, 'node')} × {counted(profile.processes, 'process')} for at most {_TIME}")
    waited, ran = time.monotonic(), None
    while True:
        found = next(iter(slurm.jobs([job])), None)
        if found is None or not found.active:
            break
        now = time.monotonic()
        if found.state != "PENDING":
            ran = ran or now
        if (ran is None and now > waited + patience) or (ran is not None and now > ran + 2 * LIMIT):
            slurm.cancel(job)
            if ran is None:
                shutil.rmtree(folder, ignore_errors=True)
                what = f"job {job} did not start within {patience:.0f} s ({found.reason}); cancelled"
                fix = "--wait longer, fewer --nodes, or another partition"
                yield Finding("warning", _AREA, what, fix)
                return
            break
        time.sleep(_POLL)
    yield from _verdict(folder, profile.nodes * profile.processes, profile.environment)


def _arguments(reports: Path, paths: Sequence[str], wandb: str) -> list[str]:
    words = ["doctor-probe", str(reports), *(w for path in paths for w in ("--path", path))]
    return words + (["--wandb", wandb] if wandb else [])


def _verdict(folder: Path, ranks: int, asked: Mapping[str, str] = MappingProxyType({})) -> Iterator[Finding]:
    found: list[Report] = read(folder / "reports")
    findings = [*judge_reports(found, ranks, log=str(main_log(folder))), *judge_placement(found, asked)]
    yield from findings
    if not any(f.level == "error" for f in findings):
        shutil.rmtree(folder, ignore_errors=True)
