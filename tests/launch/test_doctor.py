"""The doctor's judgement: settings as Slurm prints them, nodes as they report, and the command without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

import pytest
from toy import write_recipe

from stamo_dist.launch.doctor.diagnose import diagnose
from stamo_dist.launch.doctor.disk import measure
from stamo_dist.launch.doctor.probe import Report
from stamo_dist.launch.doctor.settings import judge_settings, read_settings
from stamo_dist.launch.doctor.verdict import Finding, judge_reports

CONFIG = """\
Configuration data as of 2026-03-01T12:00:00
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = cred_expire=20
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/cgroup
PropagateResourceLimits = NONE
RequeueExit             = (null)
SlurmctldParameters     = preempt_send_user_signal
"""
PARTITION = {"PreemptMode": "REQUEUE", "GraceTime": "60"}
NODE = Report(
    rank=0, ranks=4, local_rank=0, local_ranks=2, host="n1", stage="done", python="3.11", packages={"torch": "2.13"},
    cpus=8, address="10.0.0.1", shm=(1 << 34, 1 << 34), limits={"nofile": 1 << 20, "memlock": -1}, driver="580",
    gpus=["H100", "H100"], cuda="13.0", links={"n2": 0.001}, init={"gloo": 0.5, "nccl": 2.0},
    latency={"gloo": 1e-4, "nccl": 3e-5}, bandwidth={"gloo": 1e9, "nccl": 40e9},
)  # fmt: skip


def troubles(findings: list[Finding]) -> list[str]:
    return [f"{f.level}: {f.what} → {f.fix}" for f in findings if f.level != "fine"]


@pytest.mark.parametrize(
    ("line", "instead", "partition", "leaving", "expected"),
    [
        ("cgroup", "cgroup", {}, 20.0, None),
        ("accounting_storage/slurmdbd", "accounting_storage/none", {}, None, "note: accounting is off"),
        ("proctrack/cgroup", "proctrack/linuxproc", {}, None, "warning: proctrack/linuxproc loses processes"),
        ("cred_expire=20", "socket=/run/munge", {}, None, "note: a requeued job waits 121 s"),
        (
            "RequeueExit             = (null)",
            "RequeueExitHold = 70-80",
            {},
            None,
            "warning: RequeueExitHold=70-80 takes in code 75",
        ),
        (
            "preempt_send_user_signal",
            "(null)",
            {},
            None,
            "note: before preemption there is no user signal, only SIGTERM",
        ),
        ("12:00:00", "12:05:00", {}, None, "warning: this machine's clock is -299 s from the controller's"),
        ("cgroup", "cgroup", {"PreemptMode": "CANCEL"}, None, "warning: preempted jobs are cancelled, not requeued"),
        ("cgroup", "cgroup", {"PreemptMode": "GANG,SUSPEND"}, None, "warning: preempted jobs are stopped and keep"),
        ("cgroup", "cgroup", {"GraceTime": "0"}, 20.0, "warning: preemption gives no grace time (GraceTime=0)"),
        (
            "cgroup",
            "cgroup",
            {"GraceTime": "0"},
            31.0,
            "error: a preempted run has 0 s (GraceTime) and 30 s (KillWait)",
        ),
        ("cgroup", "cgroup", {"GraceTime": "0", "PreemptMode": "OFF"}, 900.0, None),
    ],
)
def test_settings_that_hurt(line, instead, partition, leaving, expected):
    assert line in CONFIG
    config = read_settings(CONFIG.replace(line, instead))
    now = datetime.fromisoformat("2026-03-01T12:00:01")
    found = troubles(list(judge_settings(config, PARTITION | partition, leaving=leaving, now=now)))
    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        (
            {"links": {"n1": "port 4711: timed out"}},
            ["error: n2 cannot connect to n1: port 4711: timed out", "exclude"],
        ),
        ({"address": "127.0.1.1"}, ["warning: n2 takes its own name for 127.0.1.1", "GLOO_SOCKET_IFNAME"]),
        ({"resolving": 5.0}, ["warning: n2 takes 5.0 s to look up its own name", "/etc/hosts"]),
        ({"clock": -3.0}, ["warning: n2: its clock is -3.0 s from rank 0's", "NTP"]),
        ({"packages": {"torch": "2.11"}}, ["warning: n1 and n2 have other versions: torch 2.13 ≠ 2.11", "environment"]),
        ({"cuda": "", "gpus": []}, ["error: n2 has GPUs (driver 580), but torch 2.13 is built without CUDA", "GPUs"]),
        ({"gpus": ["H100"]}, ["error: n2 shows 1 GPU to 2 ranks", "gpus_per_node"]),
        ({"shm": (1 << 26, 1 << 26)}, ["warning: n2: /dev/shm has 67 MB free of 67 MB", "--shm-size"]),
        ({"limits": {"nofile": 1024}}, ["warning: n2: a process may open 1024 files only", "ulimit -n"]),
        ({"bandwidth": {"nccl": 2e8}}, ["warning: nccl: set up in 2.0 s", "NCCL_DEBUG=INFO"]),
        (
            {"stage": "setting up nccl", "error": "not done after 100 s", "init": {}, "bandwidth": {}},
            ["error: rank 2 @ n2 ended while setting up nccl: not done after 100 s", "NCCL_SOCKET_IFNAME"],
        ),
        (
            {"stage": "waiting to see the other ranks' files", "error": "TimeoutError: no file of rank 0", "links": {}},
            ["error: rank 2 @ n2 ended while waiting to see", "a run_dir on such a file system"],
        ),
    ],
)
def test_what_nodes_report(change, expected):
    second = replace(NODE, rank=2, host="n2", links={"n1": 0.001}) if change else replace(NODE, rank=2, host="n2")
    reports = [NODE, replace(NODE, rank=1, local_rank=1, links={}), replace(second, **change)]
    found = troubles(list(judge_reports([*reports, replace(second, rank=3, local_rank=1)], 4, log="main.log")))
    about_gpus = [f for f in found if "have other GPUs" in f]
    found = [f for f in found if f not in about_gpus]
    assert bool(about_gpus) == ("gpus" in change)
    assert len(found) == bool(expected)
    assert all(part in found[0] for part in expected)


def test_a_rank_that_never_came():
    found = troubles(list(judge_reports([NODE], 4, log="main.log")))
    assert "of 4 ranks 3 left no report (rank 1, 2, 3)" in found[0]
    assert "main.log" in found[0]


def test_disks_are_left_as_they_were(tmp_path):
    disk = measure(tmp_path / "not" / "there", megabytes=2)
    assert disk.error is None
    assert disk.write > 1e6
    assert disk.small > 1
    assert disk.free > 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    found = diagnose(None, (), "local", None, job=True, patience=0.0, say=lambda _: None)
    errors = [finding.what for finding in found if finding.level == "error"]
    assert errors == [
        f"run_dir: {tmp_path / 'runs'}: {tmp_path / 'runs'} is no folder; choose another with --set run_dir=…"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_a_recipe_lacks(stamo, toy, tmp_path, monkeypatch):
    """Without processes: exit code 1, each trouble once and with its field; all is well once the data is there."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    lacking = stamo("doctor", recipe, "--no-job", "--set", "data.sources.a.path=nowhere", "--json", check=False)
    assert lacking.returncode == 1
    errors = [f["what"] for f in json.loads(lacking.stdout) if f["level"] == "error"]
    assert len(errors) == 1
    assert "data.sources.a: nowhere: no such folder" in errors[0]
    fine = stamo("doctor", recipe, "--no-job").stdout
    assert "data and weights are there and fit the recipe" in fine
    assert "✗" not in fine
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    absent = stamo("doctor", recipe, "--no-job", "--set", "model.decoder.weights=some/model").stdout
    assert "! --set model.decoder.weights: some/model is not in the hub's cache" in absent
    assert "hf download some/model" in absent


def test_weights_of_another_model_and_an_empty_cache_are_refused(stamo, toy, tmp_path, monkeypatch):
    """`doctor` and `submit` say so here, with the recipe's line and the fix; nothing is started."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    wrong = ("--set", f"model.decoder.weights={toy.vae}", "--set", "model.vae.weights=some/vae@v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--some--vae" / "refs").mkdir(parents=True)
    for command in (("doctor", recipe, "--no-job"), ("submit", recipe, "--cluster", "local", "--dry-run")):
        done = stamo(*command, *wrong, check=False)
        assert done.returncode == (1 if command[0] == "doctor" else 2)
        said = done.stdout + done.stderr
        assert f"model.decoder.weights: {toy.vae}/config.json says _class_name AutoencoderKL" in said
        assert "some/vae@v1 is not in the hub's cache, and HF_HUB_OFFLINE is set" in said
        assert "`hf download some/vae --revision v1`" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    noted = stamo("submit", recipe, "--cluster", "local", "--dry-run", *wrong[2:]).stdout
    assert "some/vae@v1 is not in the hub's cache; nodes without network cannot get it: `hf download some/vae" in noted
    assert not (tmp_path / "run").exists()
