"""Runs on a real cluster are stopped in all the ways there are, and end as if nothing had happened."""

from __future__ import annotations

import sys
from pathlib import Path

from toy import write_recipe

# Steps take long enough for a test to come between them, and cost no CPU.
SLOW = (
    "tasks/tokenizer.py",
    "\n\nimport time as _time\n\n_loss = TokenizerTask.loss\n\n\n"
    "def _slow(self, *inputs):\n    _time.sleep(0.25)\n    return _loss(self, *inputs)\n\n\n"
    "TokenizerTask.loss = _slow\n",
)


def test_time_limit_and_preemption(submit, cluster, preempt):
    """2 nodes × 2 tasks: asked to stop before its time is up, then preempted with time to save. No step is lost."""
    profile = {"partition": "low", "nodes": 2, "processes_per_node": 2, "time": "00:01:00", "signal_delay": 59}
    settings = ("train.steps=100", "train.checkpoint.every=1000")
    run = submit("run", profile, *settings)
    run.release(SLOW)
    run.until(lambda: "requeued" in run.story)
    assert run.steps == run.events[-1].step
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.starts(2, steps=3)
    preempt()
    run.starts(3)
    run.ends("finished")
    assert run.story == ["submitted", *["started", "preempted", "requeued"] * 2, "started", "finished"]
    for left, began in zip(run.events[2::3], run.events[4::3], strict=False):
        assert left.step == began.step
    log = (run.folder / "logs/main.log").read_text()
    assert "SIGUSR1 on rank 0, 1, 2, 3: saved" in log
    assert "SIGTERM on rank 0, 1, 2, 3: saved" in log
    assert "the cluster gives 20 s" in log  # the partition's GraceTime, less than the profile's signal_delay
    heads = (run.folder / "logs/rank_00003.log").read_text().split("\n")
    assert sum(f"of job {run.job}: rank 3 of 4 @ {cluster.names[1]}," in line for line in heads) == 3
    assert cluster.state(run.job) == "COMPLETED"
    run.assert_as_uninterrupted(processes=4, exactly=False)  # among 4, the order of a sum is not fixed


def test_preemption_without_grace_and_a_dead_node(submit, cluster, preempt):
    """1–2 nodes: preempted with GraceTime 0, and queued again by Slurm itself; then goes on without a dead node."""
    first, second, third = cluster.names
    profile = {"partition": "now", "nodes": 2, "min_nodes": 1, "exclude": third, "processes_per_node": 1}
    settings = (
        "train.steps=60",
        "train.micro_batch=8",
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
        run.ends("finished")
    finally:
        cluster.start_node(second)
    assert run.story[-3:] == ["requeued", "started", "finished"]
    run.assert_as_uninterrupted(processes=2, exactly=False)
    cluster.until(lambda: cluster.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "3")


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
    assert "SIGUSR1 on rank 0, 1: saved" in log()
    assert "SIGTERM: will save" in log()
