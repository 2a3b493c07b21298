"""Runs on a real cluster as a person sees and steers them: status, logs, cancel, resume, doctor."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_interrupted import SLOW

from stamo_dist.launch.record import Event, record

ROOT = Path(__file__).resolve().parents[2]
#: Rank 1 fails in its third step; the others only notice that it has gone.
BROKEN = (
    "tasks/tokenizer.py",
    "\n\nimport os as _os\n\n_good, _calls = TokenizerTask.loss, []\n\n\n"
    "def _bad(self, *inputs):\n    _calls.append(1)\n    if _os.environ['RANK'] == '1' and len(_calls) > 2:\n"
    "        raise ValueError('the frames are upside down')\n    return _good(self, *inputs)\n\n\n"
    "TokenizerTask.loss = _bad\n",
)


def test_from_the_queue_to_the_end(submit, cluster, stamo_there):
    """Queued, running, requeued, cancelled, resumed, finished: each is seen, and the steps are those of one run."""

    def seen(name: Any = "toy") -> dict[str, Any]:
        return json.loads(stamo_there("status", name, "--json"))[0]

    run = submit("run", {"nodes": 2, "exclude": cluster.names[2]}, "train.steps=60", "train.checkpoint.every=1000")
    first = seen()
    assert (first["state"], first["steps"], first["nodes"]) == ("queued", 60, "2 × 1")
    assert "held" in first["detail"]
    assert "no logs yet" in stamo_there("logs", "toy", code=2)
    assert "is queued already" in stamo_there("resume", run.folder, code=2)
    run.release(SLOW)
    run.starts(1, steps=3)
    running = seen(run.folder)
    assert (running["state"], running["restarts"], running["steps"]) == ("running", 0, 60)
    assert 3 <= running["step"] <= run.steps
    assert 4 < running["samples_per_second"] < 40  # 8 a step, of a quarter of a second
    assert 0 < running["eta"] < 120
    assert running["loss"] == pytest.approx(run.metrics()[running["step"] - 1]["loss"])
    assert running["nodes"] == cluster.run("squeue", "-h", "-j", run.job, "-o", "%N").strip()
    cluster.run("scontrol", "requeue", run.job)
    run.until(lambda: cluster.state(run.job) == "PENDING")
    waiting = seen()
    assert (waiting["state"], waiting["restarts"]) == ("requeued", 1)
    run.starts(2, steps=2)
    where = f"{cluster.names[0]},{cluster.names[1]} × 2 ranks"
    assert len(re.findall(rf"started .*{where}", stamo_there("status", "toy"))) == 2
    assert "toy: job" in stamo_there("cancel", "toy")
    run.until(lambda: cluster.state(run.job) == "CANCELLED")
    ended = seen()
    assert (ended["state"], ended["checkpoint"]) == ("cancelled", ended["step"])
    assert f"goes on after step {ended['step']}" in stamo_there("resume", "toy")
    cluster.run("scontrol", "release", run.job)
    log = stamo_there("logs", "toy", "--rank", "1", "--follow", "--lines", "0")
    assert log.count(f"rank 1 of 2 @ {cluster.names[1]}") == 3
    run.ends("finished")
    assert seen()["state"] == "finished"
    run.assert_as_uninterrupted(processes=2)
    assert "has finished" in stamo_there("resume", "toy", code=2)
    assert "finished" in stamo_there("runs", run.folder.parent)


def test_who_failed_first(submit, stamo_there):
    profile = {"nodes": 2, "max_restarts": 0}
    run = submit("run", profile, "train.steps=60", "train.checkpoint.every=1000", "data.workers=0")
    run.release(BROKEN)
    run.ends("failed")
    shown = stamo_there("status", run.folder.parent)
    assert re.search(r"failed +rank 1: ValueError: the frames are upside down", shown)


def test_lost_without_slurm(submit, cluster, stamo_there):
    """What Slurm has forgotten, or cannot be asked, is told from the folder alone."""
    run = submit("run", {})
    cluster.run("scancel", run.job)
    launch = run.folder / "launch/launch.json"
    before = launch.read_text()
    launch.write_text(before.replace(f'"{run.job}"', '"999999"'))
    [seen] = json.loads(stamo_there("status", "toy", "--json"))
    assert seen["state"] == "lost"
    record(run.folder, Event("finished", job="999999"))
    assert json.loads(stamo_there("status", "toy", "--json"))[0]["state"] == "stopped", "no step is saved"
    last = run.folder / "checkpoints" / f"step_{seen['steps']:08d}"
    for made in (last, run.folder / "model"):
        made.mkdir(parents=True)
    (last / "checkpoint.json").write_text("{}")
    (run.folder / "exported.json").write_text(json.dumps({"step": seen["steps"]}))
    assert json.loads(stamo_there("status", "toy", "--json"))[0]["state"] == "finished"
    launch.write_text(before)


def test_doctor(cluster, stamo_there, tmp_path):
    """A job on two nodes tells what they are like; everything it made is gone afterwards."""
    profile = tmp_path / "lab.yaml"
    profile.write_text(yaml.safe_dump({"partition": "now", "nodes": 2, "processes_per_node": 1}))
    began = time.monotonic()
    found = json.loads(stamo_there("doctor", "--cluster", profile, "--json"))
    assert time.monotonic() - began < 100
    said = {level: " ".join(f["what"] for f in found if f["level"] == level) for level in ("fine", "warning", "error")}
    assert not said["error"]
    assert f"{cluster.names[0]}, {cluster.names[1]}: 2 ranks" in said["fine"]
    assert "gloo: set up in" in said["fine"]
    assert "GraceTime=0" in said["warning"]
    assert not list(ROOT.glob(".doctor-*"))
