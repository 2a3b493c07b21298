"""The `stamo` command with a fault in the loss: `python faulty.py '{"RANK": {"FAULT": [...]}}' train …`.

Faults of a rank: `nan` and `gradient` take numbers of global batches, from 1, at which the loss, or only its gradient,
is not a number; `stuck` those at which it stops computing; `slow` takes [seconds] that each micro-batch takes longer,
`evaluate` those that a measurement between steps does; `grown` [folder] of a source that has half of it for this rank.
"""

from __future__ import annotations

import json
import os
import sys
import time

from stamo_dist import cli
from stamo_dist.data import sources
from stamo_dist.data.schema import Split, read_manifest
from stamo_dist.evaluate import during
from stamo_dist.tasks.tokenizer import TokenizerTask

faults = json.loads(sys.argv.pop(1)).get(os.environ["RANK"], {})
honest, measure = TokenizerTask.loss, during.measure


def loss(self, module, batch, noise):
    time.sleep(*faults.get("slow", [0]))
    out = honest(self, module, batch, noise)
    number = batch.cursor.samples // self.global_batch
    if number in faults.get("stuck", []):
        time.sleep(600)
    if number in faults.get("nan", []):
        out.loss = out.loss * float("nan")
        out.per_sample["loss"] = out.per_sample["loss"] * float("nan")
    if number in faults.get("gradient", []):
        out.loss.register_hook(lambda g: g * float("nan"))
    return out


def slowly(*args):
    time.sleep(*faults["evaluate"])
    return measure(*args)


def halved(path):
    found = read_manifest(path)
    if str(path) not in faults["grown"]:
        return found
    half = {k: Split(episodes=v.episodes // 2, frames=v.frames // 2) for k, v in found.splits.items()}
    return found.model_copy(update={"splits": half})


if "grown" in faults:
    sources.read_manifest = halved
if "evaluate" in faults:
    during.measure = slowly
TokenizerTask.loss, TokenizerTask.global_batch = loss, 8
cli.main()
