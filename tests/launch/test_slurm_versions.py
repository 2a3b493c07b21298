"""What is read of Slurm's commands, as several versions of it print them.

The goldens are recorded: of Debian's packages (bullseye, bookworm, trixie, sid) on one node of four GPUs, without
accounting. A script submitted a job (comment `stamo-1 JobState=X`), a held array and a held job, then requeued
the first and cancelled all.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from stamo_dist.launch import checks, grace, slurm
from stamo_dist.launch.doctor.settings import read_settings
from stamo_dist.launch.profile import ClusterProfile

GOLDENS = sorted((Path(__file__).parent / "goldens" / "slurm").glob("*.txt"))


class Recorded:
    """One version's outputs, by the part of the script in which they were recorded."""

    def __init__(self, file: Path):
        parts = re.split(r"(?m)^=== (\S+)\n", file.read_text())
        self.said = dict(zip(parts[1::2], parts[2::2], strict=True))
        self.now = "squeue"

    def execute(self, command: Sequence[str], stdin: str | None, cwd: str | None) -> subprocess.CompletedProcess[str]:
        text, _, code = self.said[self.now].rpartition("rc=")
        return subprocess.CompletedProcess(command, int(code), text, text)


@pytest.fixture(params=GOLDENS, ids=[file.stem for file in GOLDENS])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded(request.param)
    monkeypatch.setattr(slurm, "_execute", found.execute)
    monkeypatch.setattr(slurm, "tool", lambda name: f"/slurm/{name}")
    return found


def test_there_are_versions_before_and_after_those_that_clusters_run() -> None:
    assert len(GOLDENS) == 4
    assert GOLDENS[0].stem < "21.08"
    assert GOLDENS[-1].stem > "25.05"


def test_jobs(recorded: Recorded) -> None:
    jobs = slurm.jobs()
    first = next(job for job in jobs if job.state == "RUNNING")
    assert (first.reason, first.nodes, first.count) == ("None", "n1", 1)
    assert (first.partition, first.user, first.name, first.limit) == ("gpu", "root", "tok", "1:00:00")
    assert first.start is not None
    held = [job for job in jobs if job is not first]
    array = str(int(first.id) + 1)
    assert sorted(job.id for job in held) == [f"{array}_0", f"{array}_1", str(int(array) + 1)]
    assert {(job.state, job.reason, job.start, job.nodes) for job in held} == {("PENDING", "JobHeldUser", None, "")}
    assert {job.id for job in slurm.jobs([array])} == {f"{array}_0", f"{array}_1"}
    recorded.now = "squeue3"
    assert {job.state for job in slurm.jobs([first.id, array])} == {"CANCELLED"}
    assert not any(job.active for job in slurm.jobs())
    recorded.now = "comment"
    assert slurm.commented("stamo-1 JobState=X") == first.id


def test_details_and_what_becomes_of_a_job(recorded: Recorded) -> None:
    recorded.now = "job"
    found = slurm.details("1")
    assert (found["JobState"], found["Restarts"], found["TimeLimit"]) == ("RUNNING", "0", "01:00:00")
    assert slurm.fate("1", 0) == ""
    recorded.now = "array"
    assert slurm.details("2_1")["ArrayTaskId"] == "1"
    recorded.now = "requeued"
    assert slurm.fate("1", 0) == "queued"
    recorded.now = "cancelled"
    assert slurm.fate("1", 1) == "cancelled"
    recorded.now = "unknown"
    assert slurm.details("999") == {}


@pytest.mark.parametrize(
    ("shown", "fate"),
    [
        ("Reason=None RunTime=00:01:08 TimeLimit=00:10:00 PreemptTime=None", "cancelled"),
        ("Reason=None RunTime=00:10:02 TimeLimit=00:10:00 PreemptTime=None", "ending"),
        ("Reason=None RunTime=00:01:08 TimeLimit=00:10:00 PreemptTime=2026-11-29T19:08:58", "ending"),
        ("Reason=TimeLimit RunTime=00:01:08 TimeLimit=00:10:00 PreemptTime=None", "ending"),  # its reservation is over
    ],
)
def test_who_ends_a_job(monkeypatch: pytest.MonkeyPatch, shown: str, fate: str) -> None:
    """As 22.05 shows a job while it completes."""
    monkeypatch.setattr(slurm, "run", lambda *_: f"JobId=1 JobState=COMPLETING {shown} Restarts=0\n")
    assert slurm.fate("1", 0) == fate


def test_partitions_and_settings(recorded: Recorded) -> None:
    recorded.now = "partition"
    partitions = slurm.partitions()
    gpu, staff = partitions["gpu"], partitions["staff"]
    assert (gpu["Default"], gpu["State"], gpu["TotalNodes"], gpu["MaxTime"]) == ("YES", "UP", "1", "2-00:00:00")
    assert (gpu["AllowAccounts"], staff["AllowAccounts"]) == ("ALL", "staff,admins")
    recorded.now = "config"
    config = slurm.config()
    assert grace.preemption_grace(config, gpu) == 30
    assert grace.kill_wait(config) == 30
    settings = read_settings(recorded.said["config"])
    assert settings["as of"].startswith("20")
    assert settings["ClusterName"] == "lab"


def test_refusals(recorded: Recorded) -> None:
    profile = ClusterProfile()
    recorded.now = "badopt"
    with pytest.raises(slurm.SlurmError) as refused:
        slurm.run("sbatch", "--test-only")
    assert "unrecognized option" in str(refused.value)
    assert "no such option; `sbatch --help` lists those it has" in checks.hinted(str(refused.value), profile)
    recorded.now = "away"
    with pytest.raises(slurm.SlurmAwayError):
        slurm.run("squeue")


def test_the_shell_hides_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that filter what Slurm's commands show or end are not passed on, nor those of an allocation in which
    one submits; hidden partitions are shown."""
    (tmp_path / "squeue").write_text("#!/bin/sh\nenv\nprintf 'NAME=caf\\351\\n'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SQUEUE_PARTITION", "SCANCEL_USER", "SLURM_TIME_FORMAT", "SLURM_MEM_PER_NODE", "SLURM_CONF"):
        monkeypatch.setenv(name, "else")
    said = dict(line.split("=", 1) for line in slurm.run("squeue").splitlines() if "=" in line)
    found = {name: value for name, value in said.items() if re.match("SQUEUE_|SCONTROL_|SCANCEL_|SLURM_", name)}
    assert found == {"SQUEUE_ALL": "1", "SCONTROL_ALL": "1", "SLURM_CONF": "else"}
    assert said["NAME"] == "caf\ufffd", "somebody's job"


def test_an_array_is_found_by_its_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks that were started have ids of their own, and come before the last one, whose id is the array's."""
    rows = [{"A": "6", "F": "5", "k": "stamo-1"}, {"A": "5", "F": "5", "k": "stamo-1"}]

    def execute(command: Sequence[str], *_: object) -> subprocess.CompletedProcess[str]:
        form = next(word.partition("=")[2] for word in command if word.startswith("--format="))
        shown = "".join(re.sub(r"%(\w)", lambda m, row=row: row[m[1]], form) + "\n" for row in rows)
        return subprocess.CompletedProcess(command, 0, shown, "")

    monkeypatch.setattr(slurm, "_execute", execute)
    monkeypatch.setattr(slurm, "tool", lambda name: f"/slurm/{name}")
    assert slurm.commented("stamo-1") == "5"
