"""Runs on a real cluster are stopped in all the ways there are, and end as if nothing had happened."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from toy import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def slowed(seconds: float) -> tuple[str, str]:
    """A micro-batch takes long enough for a test to come between it and the next, and costs no CPU."""
    return (
        "tasks/tokenizer.py",
        "\n\nimport time as _time\n\n_loss = TokenizerTask.loss\n\n\n"
        f"def _slow(self, *inputs):\n    _time.sleep({seconds})\n    return _loss(self, *inputs)\n\n\n"
        "TokenizerTask.loss = _slow\n",
    )


SLOW = slowed(0.25)


def test_time_limit_and_preemption(submit, cluster, preempt):
    """2 nodes × 2 tasks: asked to stop before its time is up, then preempted with time to save. No step is lost."""
    # slurmctld looks every 30 s and signals up to 30 s early: here 5 to 35 s after the start. Sooner, there would be no
    # step to signal yet on a loaded machine, and Slurm sends it once.
    profile = {"partition": "low", "nodes": 2, "processes_per_node": 2, "time": "00:02:00", "signal_delay": 85}
    settings = ("train.steps=60", "train.checkpoint.every=1000", "strategy.name=fsdp")
    run = submit("run", profile, *settings, "tracking.wandb=offline")
    run.release(slowed(0.5))
    run.until(lambda: "requeued" in run.story)
    assert run.steps == run.events[-1].step
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.starts(2, steps=3)
    preempt()
    run.starts(3)
    run.ends("finished")
    assert run.story == ["submitted", *["started", "preempted", "requeued"] * 2, "started", "exporting", "finished"]
    for left, began in zip(run.events[2::3], run.events[4::3], strict=False):
        assert left.step == began.step
    log = (run.folder / "logs/main.log").read_text()
    # Slurm signals node after node: a step may end in between, so that not all ranks are in its request.
    assert re.search(r"SIGUSR1 on rank [0-3](, [0-3])*: saved", log)
    assert re.search(r"SIGTERM on rank [0-3](, [0-3])*: saved", log)
    assert "the cluster gives 20 s" in log  # the partition's GraceTime, less than the profile's signal_delay
    heads = (run.folder / "logs/rank_00003.log").read_text().split("\n")
    assert sum(f"of job {run.job}: rank 3 of 4 @ {cluster.names[1]}," in line for line in heads) == 3
    assert cluster.state(run.job) == "COMPLETED"
    steps = wandb_steps(run.folder)
    assert len(steps) == 1, "one W&B run"
    assert len(steps[0]) == 3, "with one folder a start"
    assert [step for start in steps[0] for step in start] == list(range(1, 61))
    run.assert_as_uninterrupted(processes=4)


def wandb_steps(run: Path) -> list[list[list[int]]]:
    """Of each W&B run id, of each of its starts in turn, the steps in the offline file of the start."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[list[int]]] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        steps, identity = [], ""
        for data in logged(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            identity = record.run.run_id or identity
            if any("loss" in (item.key, *item.nested_key) for item in record.history.item):
                steps.append(record.history.step.num)
        found.setdefault(identity, []).append(steps)
    return list(found.values())


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, in which W&B writes: parts with a head, in blocks of 32 kB."""
    at, whole = 7, b""  # after the file's own head
    while at + 7 <= len(data):
        if (left := -at % 32768 or 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_preemption_without_grace_and_a_dead_node(submit, cluster, preempt):
    """1–2 nodes: preempted with GraceTime 0, and queued again by Slurm itself; then goes on without a dead node, and
    with it when it is back. Virtual workers: no number of processes changes a bit."""
    first, second, third = cluster.names
    profile = {"partition": "now", "nodes": 2, "min_nodes": 1, "exclude": third, "processes_per_node": 1}
    settings = (
        "train.steps=70",
        "train.micro_batch=8",
        "train.virtual_workers=2",
        "train.checkpoint.every=1000",
        "train.checkpoint.ephemeral_every=4",
    )
    run = submit("run", profile, *settings)
    run.release(SLOW)
    run.starts(1, steps=5)
    preempt()
    run.starts(2, steps=6)
    assert run.events[-1].step == run.events[-3].step  # what it saved on SIGTERM
    assert [e.reason for e in run.events if e.event == "requeued"] == ["by Slurm"]
    before = run.steps
    cluster.kill_node(second)
    try:
        run.starts(3)
        started = run.events[-1]
        assert started.nodes == [first]
        assert started.world_size == 1
        assert started.step >= before - 4
    finally:
        cluster.start_node(second)
    cluster.until(lambda: cluster.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2")
    cluster.run("scontrol", "requeue", run.job)
    run.starts(4)
    assert (run.events[-1].nodes, run.events[-1].world_size) == ([first, second], 2)
    run.ends("finished")
    assert run.story[-4:] == ["requeued", "started", "exporting", "finished"]
    run.assert_as_uninterrupted(processes=2)


def test_no_scontrol(submit, cluster):
    """Where the nodes have none, it says so and `stamo resume` goes on; where only PATH lacks it, it is found."""
    node = cluster.names[2]
    settings = ("train.steps=40", "train.micro_batch=8", "train.checkpoint.every=1000")
    path = cluster.root / "few"
    path.mkdir()
    for name in ("srun", "sh", "uname", "nsenter"):  # the cluster's srun is a script
        (path / name).symlink_to(cluster.bin / name if name == "srun" else shutil.which(name) or "")
    profile = {"sbatch": {"nodelist": node}, "environment": {"OMP_NUM_THREADS": 1, "PATH": str(path)}}
    run = submit("run", profile, *settings)
    run.release(SLOW)
    with cluster.without(node, cluster.bin / "scontrol", *cluster.programs("scontrol")):
        run.starts(1, steps=3)
        cluster.run("scancel", "--signal=USR1", run.job)
        run.ends("stopped")
    assert "scontrol: not found" in run.events[-1].reason
    assert f"`stamo resume {run.folder}` goes on" in run.events[-1].reason
    assert run.events[-1].step == run.steps  # it saved
    done = subprocess.run(
        [sys.executable, "-m", "stamo_dist.cli", "resume", str(run.folder)], check=False, capture_output=True,
        text=True, timeout=180, cwd=ROOT, env={**cluster.env, "XDG_STATE_HOME": str(run.folder.parent / "state")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cluster.run("scontrol", "release", run.job)
    run.starts(2, steps=3)
    cluster.run("scancel", "--signal=USR1", run.job)
    run.starts(3)
    run.ends("finished")
    assert run.story[-5:] == ["started", "preempted", "requeued", "started", "finished"]
    run.assert_as_uninterrupted(processes=1)


def test_two_jobs_on_one_node(submit, cluster):
    """One is ended by scancel and stays so; the other, queued again by scontrol, goes on beside it unimpressed."""
    profile = {"partition": "low", "processes_per_node": 1, "sbatch": {"nodelist": cluster.names[0]}}
    settings = ("train.steps=30", "train.micro_batch=8", "train.checkpoint.every=1000")
    ended, other = submit("ended", profile, *settings), submit("other", profile, *settings)
    ended.release(SLOW)
    other.release(SLOW)
    ended.starts(1, steps=3)
    other.starts(1, steps=3)
    cluster.run("scancel", ended.job)
    cluster.run("scontrol", "requeue", other.job)
    other.starts(2)
    other.ends("finished")
    ended.ends("cancelled")
    assert ended.story == ["submitted", "started", "cancelled"]
    assert cluster.state(ended.job) == "CANCELLED"
    assert ended.events[-1].step == ended.steps  # it saved
    assert other.story == ["submitted", "started", "preempted", "requeued", "started", "finished"]
    other.assert_as_uninterrupted(processes=1)


def test_crash_loop_ends(submit, cluster):
    """A crash of our own code is started again as often as the profile says, and then given up with the reason."""
    run = submit("run", {"partition": "low", "max_restarts": 1})
    run.release(("train.py", '\nraise RuntimeError("a bug")\n'))
    run.ends("failed")
    assert run.story == ["submitted", "started", "failed", "requeued", "started", "failed"]
    assert "brought it no further" in run.events[-1].reason
    assert "RuntimeError: a bug" in (run.folder / "logs/main.log").read_text()
    assert cluster.state(run.job) == "FAILED"
    assert not list(Path(run.folder).glob("checkpoints/step_*"))


def test_plain_sbatch(cluster, toy, tmp_path):
    """The example for those who do without `stamo submit`, on 2 nodes: asked to stop, queued again, it goes on."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1",
        f"--output={tmp_path}/log", "slurm/train.sbatch", str(recipe), "--set", "train.steps=2000",
        path=Path(sys.executable).parent,
    ).strip()  # fmt: skip
    steps = tmp_path / "run" / "metrics.jsonl"

    def log() -> str:
        return (tmp_path / "log").read_text()

    cluster.until(lambda: steps.exists() and steps.read_text().count("\n") > 3, what=log)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.until(lambda: "after step" in log(), what=log)
    cluster.run("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED", what=log)
    assert re.search(r"SIGUSR1 on rank [01](, 1)?: saved", log())
    assert "SIGTERM: will save" in log()
