"""What runs beside a training: without the variables of its ranks, and as a Slurm job under its profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from stamo_dist.errors import RunError
from stamo_dist.launch import aside
from stamo_dist.launch.record import Launch
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.launch.submit import script

PROFILE = {
    "partition": "gpu", "account": "lab", "nodes": 4, "gpus_per_node": 8, "gpu_type": "h100", "cpus_per_gpu": 12,
    "segment": 2, "exclusive": True, "cpu_bind": "gpu",
}  # fmt: skip


def trained(run: Path) -> None:
    Launch(
        name="policy", run_dir=str(run), recipe="r.yaml", command=["train", "r.yaml"], cluster="h100", profile=PROFILE,
        nodes=4, snapshot=str(run / "launch/snapshots/now"),
    ).write()  # fmt: skip


@pytest.fixture(autouse=True)
def _own_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_job_under_the_profile_of_the_training(tmp_path: Path) -> None:
    run = tmp_path / "policy"
    trained(run)
    folder = run / "eval/during/step_00001000"
    launch, profile = aside.launch_of(run, None, folder, ["eval", "during", str(run), "1000"])
    text = script(JobOrder(launch, profile))
    for line in ("partition=gpu", "account=lab", "nodes=1", "gpus-per-node=h100:1", "cpus-per-task=12"):
        assert f"#SBATCH --{line}\n" in text
    assert "--segment" not in text
    assert "--exclusive" not in text
    assert f"exec {__import__('sys').executable} {run}/launch/snapshots/now/code/run.py" in text
    assert f"stamo_dist.launch.rank eval during {run} 1000" in text
    launch.write()
    listed = [path.resolve() for path in (tmp_path / "state/stamo/runs").iterdir()]
    assert listed == [run], "it is no run of its own in `stamo runs`"


def test_jobs_need_slurm_and_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside.slurm, "available", lambda: True)
    with pytest.raises(RunError, match=r"evaluate\.rollout\.cluster: is missing"):
        aside.launcher(tmp_path, "slurm", None)
    with pytest.raises(RunError, match=r"local is no Slurm cluster; set evaluate\.rollout\.where: process"):
        aside.launcher(tmp_path, "slurm", "local")
    monkeypatch.setattr(aside.slurm, "available", lambda: False)
    with pytest.raises(RunError, match="this machine cannot submit to Slurm; set process"):
        aside.launcher(tmp_path, "slurm", None)


def test_no_rank_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "STAMO_LAUNCHED", "SLURM_PROCID", "SLURM_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    left = aside.environment(gpus=False)
    assert not {"RANK", "MASTER_PORT", "STAMO_LAUNCHED", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES"} & left.keys()
    assert "SLURM_CONF" in left
    assert aside.environment(gpus=True)["CUDA_VISIBLE_DEVICES"] == "1"
