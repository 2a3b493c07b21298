"""`stamo chaos --slurm` on a real cluster: faults change nothing, and a run that needs a hand is found."""

from __future__ import annotations

import random
from pathlib import Path

import yaml
from toy import write_recipe

from stamo_dist.chaos import results
from stamo_dist.chaos.compare import IDENTICAL
from stamo_dist.chaos.faults import Deck, Kind
from stamo_dist.chaos.job_faults import Program, kinds

#: Anybody may preempt a job who may use a partition that comes first. `sbatch --wait` may look half a minute too late.
PREEMPT = """[ "$1" = offers ] && exec echo preempt
job=$(sbatch --parsable -p high -w "$2" -c 4 -o /dev/null --wrap true) || exit
while [ -n "$(squeue --noheader --jobs "$job")" ]; do sleep 0.2; done
"""
#: What no run gets over.
CANCEL = """[ "$1" = offers ] && exec echo rank-kill
exec scancel --name=toy
"""


def operator(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return str(path)


def seed(program: str, *wanted: Kind) -> int:
    """The first seed that deals these."""
    everything = kinds(Program(program))

    def deals(seed: int) -> bool:
        deck = Deck(random.Random(f"{seed} ddp"), everything)
        dealt = [deck.deal(hangs=True) for _ in wanted]
        return [(f.whom, f.what, f.moment) for f in dealt] == list(wanted)

    return next(seed for seed in range(100_000) if deals(seed))


def test_faults_of_jobs(cluster, toy, tmp_path, stamo_there):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    profile = tmp_path / "profile.yaml"
    given = {"partition": "low", "nodes": 2, "processes_per_node": 1, "environment": {"OMP_NUM_THREADS": 1}}
    profile.write_text(yaml.safe_dump(given))
    command = ["chaos", recipe, "--slurm", profile, "--out", tmp_path / "out", "--patience", 90]
    settings = ("train.steps=60", "train.micro_batch=4", "train.checkpoint.every=5", "data.augment.brightness=0")
    command += [word for setting in settings for word in ("--set", setting)]

    preempt = operator(tmp_path / "preempt", PREEMPT)
    wanted = ("the job", "preempted", "training"), ("all ranks", "SIGKILL", "starting")
    stamo_there(*command, "--operator", preempt, "--kills", 2, "--seed", seed(preempt, *wanted))
    found = results.read(tmp_path / "out")
    faults = [fault for result in found for fault in result.faults]
    assert [(f.whom, f.what) for f in faults] == [(whom, what) for whom, what, _ in wanted]
    assert sum(result.starts for result in found) == 2 + len(found)
    for result in found:
        assert (result.what, result.processes, result.losses) == ("ddp on Slurm", "2", IDENTICAL)
        assert (result.lost, result.repeated, result.problems) == (0, 0, [])

    cancel = operator(tmp_path / "cancel", CANCEL)
    chosen = seed(cancel, ("a rank", "SIGKILL", "training"))
    stamo_there(*command, "--operator", cancel, "--kills", 1, "--seed", chosen, code=1)
    [problem] = results.read(tmp_path / "out")[-1].problems
    assert "needs a hand: CANCELLED" in problem
    assert cluster.run("squeue", "-h", "-n", "toy") == ""
