"""What Slurm and the disk do to a run that leaves, on a real cluster: it goes on, and nothing false is said."""

from __future__ import annotations

import json
import os
import signal

import psutil
from test_interrupted import SLOW

from stamo_dist.launch.record import folder, main_log

#: A save takes longer than Slurm waits before it kills.
LONG_SAVE = (
    "checkpoint/save.py",
    "\n\n_write = _Writing.write\n\n\ndef _slow(self):\n    time.sleep(30)\n    _write(self)\n\n\n"
    "_Writing.write = _slow\n",
)


def test_the_controller_is_away(submit, cluster, stamo_there):
    """A cancel is refused and changes nothing; a run that leaves asks until it is queued again. `scancel --full` has it
    save and leave, `stamo cancel` ends it."""
    profile = {"partition": "low", "processes_per_node": 1, "sbatch": {"nodelist": cluster.names[0]}}
    run = submit("run", profile, "train.steps=400", "train.micro_batch=8", "train.checkpoint.every=1000")
    run.release(SLOW)
    run.starts(1, steps=3)
    log = main_log(run.folder)
    [script] = [
        p for p in psutil.process_iter(["cmdline"])
        if "stamo_dist.launch.job" in p.info["cmdline"] and str(run.folder) in p.info["cmdline"]
    ]  # fmt: skip
    with cluster.no_controller():
        story = run.story
        assert "Unable to contact slurm controller" in stamo_there("cancel", run.folder, code=2)
        assert run.story == story
        os.kill(script.pid, signal.SIGUSR1)  # srun passes it on without the controller
        run.until(lambda: "is to be queued again, and asks in" in log.read_text())
        [seen] = json.loads(stamo_there("status", run.folder, "--json"))
        assert (seen["state"], "Slurm does not answer" in seen["detail"]) == ("unknown", True)
        assert run.story[-1] == "preempted"
    run.until(lambda: run.story[-1] == "requeued")
    assert run.events[-1].step == run.steps, "it saved"
    run.starts(2, steps=3)
    cluster.run("scancel", "--full", "--signal=USR1", run.job)
    run.starts(3, steps=3)
    assert run.events[-1].step == run.events[-2].step == run.events[-3].step
    assert json.loads(stamo_there("status", run.folder, "--json"))[0]["state"] in ("starting", "running")
    assert f"job {run.job} cancelled" in stamo_there("cancel", run.folder)
    run.until(lambda: cluster.state(run.job) == "CANCELLED")
    assert run.story.count("cancelled") == 1
    assert run.events[-1].event == "cancelled"
    assert "nothing to cancel, it is cancelled" in stamo_there("cancel", run.folder)


def test_killed_while_it_saves(submit, cluster, preempt, stamo_there):
    """With KillWait=1 srun gives up with code 0: it is not finished. Preempted it goes on, ended it can be resumed."""
    profile = {"partition": "now", "processes_per_node": 1, "sbatch": {"nodelist": cluster.names[0]}}
    with cluster.configured(KillWait=1):
        run = submit("run", profile, "train.steps=30", "train.micro_batch=8", "train.checkpoint.every=1000")
        assert "this run has 1 s to save, and how long that takes has not been measured" in run.said
        run.release(SLOW, LONG_SAVE)
        run.starts(1, steps=3)
        preempt()
        run.starts(2, steps=3)
        cluster.run("scancel", run.job)
        run.ends("cancelled")
    assert run.story == ["submitted", "started", "preempted", "requeued", "started", "cancelled"]
    [seen] = json.loads(stamo_there("status", run.folder, "--json"))
    assert seen["state"] == "cancelled"
    assert "goes on from the start" in stamo_there("resume", run.folder)
    [seen] = json.loads(stamo_there("status", run.folder, "--json"))
    assert seen["state"] == "queued"


def test_the_disk_is_full_when_it_leaves(submit, cluster):
    """Nothing can be recorded, and it is queued again all the same; a torn line costs no other one."""
    profile = {"partition": "low", "processes_per_node": 1, "sbatch": {"nodelist": cluster.names[0]}}
    run = submit("run", profile, "train.steps=20", "train.micro_batch=8", "train.checkpoint.every=1000")
    run.release(SLOW)
    run.starts(1, steps=3)
    log = folder(run.folder) / "events.jsonl"
    kept = log.rename(log.with_suffix(".kept"))
    log.symlink_to("/dev/full")
    cluster.run("scancel", "--signal=USR1", run.job)
    run.until(lambda: cluster.state(run.job) == "PENDING")
    log.unlink()
    with kept.open("a") as f:
        f.write('{"event": "preem')
    kept.rename(log)
    run.ends("finished")
    assert run.story == ["submitted", "started", "requeued", "started", "finished"]
    assert "could not be recorded (No space left on device)" in main_log(run.folder).read_text()
    assert run.events[-2].step == run.events[-3].step > 0, "it saved"
    run.assert_as_uninterrupted(processes=1)
