"""What may happen between the last step and the end: an export that fails, and one that is asked to stop."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import write_recipe
from warm import Warm

from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED

#: As `python -m stamo_dist.cli`, with an export that takes for ever.
SLOW = """
import sys, time
import stamo_dist.train
def export(*_):
    print("exporting now", flush=True)
    time.sleep(600)
stamo_dist.train.export = export
from stamo_dist.cli import main
main()
"""


def test_a_model_that_cannot_be_written_loses_no_training(
    toy: SimpleNamespace, stamo: Any, ranks: Any, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    run.mkdir()
    (run / "model").write_text("in the way")  # of the folder that the export makes
    command = ("train", recipe, "--set", "train.steps=2")
    code, said = ranks(2, *command, check=False)
    assert code == EXIT_NOT_EXPORTED
    assert f"{run}: trained to step 2 and saved, but the model was not exported: " in said
    assert f"`stamo export {run}` writes it once that is mended" in said
    assert "Traceback" not in said
    assert not list((run / "logs").glob("watch_*"))
    assert ranks(2, *command, check=False)[0] == EXIT_NOT_EXPORTED, "it is tried again, and nothing else is done"
    (run / "model").unlink()
    stamo("export", run)
    assert json.loads((run / "exported.json").read_text()) == {"step": 2}
    assert (run / "model/stamo.json").is_file()
    assert "already trained to step 2" in ranks(1, *command)[1]
    fewer = ranks(1, *command, "--set", "train.steps=1", "--set", "optimizer.warmup_steps=1")[1]
    assert f"{run}: is at step 2, beyond train.steps (1): nothing is trained" in fewer
    early = stamo("export", shutil.copytree(run, tmp_path / "early"), "--dtype", "bfloat16", check=False)
    assert early.returncode == 2
    assert "OUT: say where a model of your choice goes" in early.stderr


def test_a_request_while_it_exports_is_answered_at_once(toy: SimpleNamespace, warm: Warm, tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "log"
    (tmp_path / "slow.py").write_text(SLOW)
    process = warm.start("train", recipe, "--set", "train.steps=2", program=tmp_path / "slow.py", stdout=log)
    try:
        deadline = time.monotonic() + 120
        while "exporting now" not in log.read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        (beat,) = (tmp_path / "run/logs").glob("watch_*/node_00000.json")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == EXIT_PREEMPTED
        assert json.loads(beat.read_text())[0]["phase"] in ("exporting", "")
    finally:
        process.kill()
    assert "SIGUSR1 while exporting: leaving with code 75 to be started again" in log.read_text()
    assert json.loads(next((tmp_path / "run/.leases").iterdir()).read_text())["ended"]


#: As `python -m stamo_dist.cli`, with an export that fails.
BROKEN = """
import stamo_dist.training.trial_export
def write_model(*_):
    raise OSError(28, "No space left on device", "here")
stamo_dist.training.trial_export.write_model = write_model
from stamo_dist.cli import main
main()
"""


def test_what_would_fail_at_the_end_fails_in_the_first_minutes(
    toy: SimpleNamespace, ranks: Any, warm: Warm, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    command = ["train", str(recipe), "--set", "train.steps=5", "--set", "train.dry_export=true"]
    (tmp_path / "broken.py").write_text(BROKEN)
    broken = warm.run(*command, program=tmp_path / "broken.py")
    assert broken.returncode == 2, broken.stderr
    assert "train.dry_export: the model could not be exported at the end of this run: [Errno 28] No" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_00000003"]
    ranks(1, *command)
    assert (run / "exported.json").is_file()
    _, said = ranks(2, *command, "--set", f"run_dir={tmp_path / 'fresh'}")
    assert "the model can be exported: " in said
    assert not list((tmp_path / "fresh").glob(".model*"))
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] == [
        pytest.approx(json.loads(line)["loss"], rel=1e-5) for line in (tmp_path / "fresh/metrics.jsonl").open()
    ]
