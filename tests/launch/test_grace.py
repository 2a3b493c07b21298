"""How long a run has to save, and the words for what Slurm refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stamo_dist.launch import checks, slurm
from stamo_dist.launch.grace import preemption_grace, too_short
from stamo_dist.launch.profile import ClusterProfile, ProfileError
from stamo_dist.recipe.training import CheckpointConfig

CONFIG = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "KillWait": "10 sec", "MaxArraySize": "9"}


@pytest.mark.parametrize(
    ("config", "partition", "seconds"),
    [
        ({}, {"GraceTime": "0"}, 10),
        ({"KillWait": "1 sec"}, {"GraceTime": "0"}, 1),
        ({"KillWait": "0 sec"}, {"GraceTime": "0"}, 0),
        ({}, {"GraceTime": "4"}, 14),  # the second SIGTERM comes too soon to end it
        ({}, {"GraceTime": "00:02:00"}, 120),  # the second one ends it
        ({}, {"GraceTime": "0", "PreemptMode": "OFF"}, None),
        ({"PreemptType": "preempt/none"}, {"GraceTime": "0"}, None),
    ],
)
def test_the_time_between_sigterm_and_sigkill(config, partition, seconds, monkeypatch):
    """Submit takes the smaller of this and the notice before the time limit."""
    assert preemption_grace(CONFIG | config, partition) == seconds
    monkeypatch.setattr(slurm, "config", lambda: CONFIG | config)
    monkeypatch.setattr(slurm, "partitions", lambda: {"low": {"Default": "YES", **partition}})
    monkeypatch.setattr(slurm, "associations", lambda user: None)
    given = checks.cluster(ClusterProfile.model_validate({"signal_delay": 60}), 1)
    assert given == min(60, seconds if seconds is not None else 60)
    assert CheckpointConfig.model_validate({"grace_seconds": given}).grace_seconds == given, "the run is told"
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    with pytest.raises(ProfileError, match="the cluster has none called high; there are low"):
        checks.cluster(ClusterProfile(), 1)


def test_a_save_that_may_not_fit_is_warned_of(tmp_path: Path):
    said = too_short(tmp_path, 10, 1000, None)
    assert said is not None
    assert (
        "has 10 s to save, and how long that takes has not been measured: if it does not fit, it would lose up" in said
    )
    assert "up to 1000 steps; set train.checkpoint.ephemeral_every" in said
    assert too_short(tmp_path, 10, 1000, 50) is None
    assert too_short(tmp_path, 60, 1000, None) is None
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "leaving.json").write_text(json.dumps({"step_seconds": 2, "save_seconds": 7.5}))
    assert too_short(tmp_path, 12, 1000, None) is None
    assert "has 10 s and needs about 11.5 s to save: it would lose up to 50 steps" in (
        too_short(tmp_path, 10, 1000, 50) or ""
    )


@pytest.mark.parametrize(
    ("words", "fields", "hint"),
    [
        ("Job violates accounting/QOS policy", {}, "your default account or your default qos allows less, or no more"),
        ("Job violates accounting/QOS policy", {"account": "lab", "qos": "long"}, "the account lab or the qos long"),
        (
            "Invalid account or account/partition",
            {"account": "lab"},
            "the account lab may not use your default",
        ),
        ("Invalid qos", {"qos": "lnog"}, "the qos lnog: `sacctmgr"),
        ("Invalid job array specification", {}, "more tasks than the cluster's MaxArraySize allows (9); give fewer"),
    ],
)
def test_what_slurm_refuses_is_explained(words, fields, hint, monkeypatch):
    monkeypatch.setattr(slurm, "config", lambda: CONFIG)
    said = checks.hinted(f"sbatch: error: {words}", ClusterProfile.model_validate(fields))
    assert hint in said.splitlines()[1]
    assert "None" not in said


def test_the_default_account_counts(monkeypatch):
    """Where sacctmgr, or sbatch's variable, names it."""
    partition = {"Default": "YES", "AllowAccounts": "staff,admins"}
    monkeypatch.setattr(slurm, "config", lambda: CONFIG)
    monkeypatch.setattr(slurm, "partitions", lambda: {"staff": partition})
    monkeypatch.setattr(slurm, "associations", lambda user: None)
    monkeypatch.setattr(slurm, "run", lambda *words: "root\n")
    with pytest.raises(ProfileError, match="not take root, your default account; it takes only staff, admins; name"):
        checks.cluster(ClusterProfile(), 1)
    monkeypatch.setenv("SBATCH_ACCOUNT", "staff")
    checks.cluster(ClusterProfile(), 1)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", slurm.SlurmAwayError),
        ("scancel: error: Kill job error on job id 3: Socket timed out on send/recv operation", slurm.SlurmAwayError),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", slurm.SlurmError),
        ("Access/permission denied for job 7", slurm.SlurmError),
    ],
)
def test_no_answer_is_no_refusal(said, kind, tmp_path, monkeypatch):
    command = tmp_path / "scancel"
    command.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(slurm.SlurmError, match="scancel 7: ") as refused:
        slurm.run("scancel", "7")
    assert type(refused.value) is kind
