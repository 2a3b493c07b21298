"""`stamo status | runs | logs | cancel | resume` for runs on this machine, as a person types them."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stamo_dist.launch import supervise, supervisor
from stamo_dist.launch.record import Event, Launch, record
from stamo_dist.launch.run_progress import read_progress
from stamo_dist.launch.status import _each, collect, find
from stamo_dist.launch.status_tables import one_run, runs_table, status_table
from stamo_dist.recipe.load import dump, load
from stamo_dist.run.folder import RunFolder
from stamo_dist.tables import Columns, Whole, show

ROOT = Path(__file__).resolve().parents[2]
#: Runs the command, and says on stderr what it imported of what takes long.
MAIN = (
    "import atexit, sys\n"
    "slow = {'torch', 'numpy', 'submitit', 'omegaconf', 'psutil', 'packaging', 'stamo_dist.recipe.schema'}\n"
    "slow |= {'urllib.request', 'stamo_dist.launch.supervise'}\n"
    "atexit.register(lambda: print(slow & set(sys.modules), file=sys.stderr))\n"
    "from stamo_dist.cli import main\nmain()\n"
)


@pytest.fixture(autouse=True)
def _own_list(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def stamo(*words: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, words)], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": os.environ.get("COLUMNS", "160")},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout + done.stderr


def started(run: Path, steps: int = 50) -> Path:
    """A run as 12 steps of training leave its folder, at two steps a second."""
    Launch(name=run.name, run_dir=str(run), recipe="", command=["train", "r.yaml"], job_ids=["local-1"]).write()
    record(run, Event("submitted"))
    record(run, Event("started", job="local-1", nodes=["here"], world_size=2))
    (run / "resolved.yaml").write_text(f"name: {run.name}\ntrain: {{steps: {steps}, global_batch: 64}}\n")
    lines = [{"step": i, "flow": 1 / i, "lr": 1e-4, "samples_per_second": 1, "seconds": i / 2} for i in range(1, 13)]
    torn = '{"step": 13, "fl'
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    whole = run / "checkpoints" / "step_00000010"
    whole.mkdir(parents=True)
    (whole / "checkpoint.json").write_text("{}")
    (run / "checkpoints" / "step_00000012").mkdir()  # never completed
    return run


def test_quick_and_without_torch(tmp_path):
    """In seconds of the CPU, which a busy machine does not lengthen as it does those of the clock."""
    for i in range(30):
        started(tmp_path / "runs" / f"run{i}")
    seconds = []
    for words in (["status"], ["status", "run3"], ["runs"], ["status", "--json"]):
        began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        assert stamo(*words).endswith("set()\n")
        seconds.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began)
    assert min(seconds) < 1.0


def test_progress_from_the_folder(tmp_path):
    started(tmp_path / "a run")
    found = json.loads(stamo("status", "a run", "--json").removesuffix("set()\n"))[0]
    assert (found["step"], found["steps"], found["checkpoint"], found["loss"]) == (12, 50, 10, 1 / 12)
    assert found["samples_per_second"] == pytest.approx(128)
    assert found["eta"] == pytest.approx(19)
    assert found["state"] == "lost"  # process 1 does not look after it
    twice = [started(tmp_path / folder / "twice") for folder in "xy"]
    refused = stamo("status", "twice", code=2)
    assert all(str(run) in refused for run in twice)
    assert "no name of a run; `stamo runs` lists" in stamo("status", "another", code=2)


@pytest.mark.parametrize(("batch", "rate"), [("{0: 64, 12: 8}", 128), ("{'0': 64, '11': 8}", 16)])
def test_the_speed_of_a_batch_that_changes(tmp_path, batch, rate):
    run = started(tmp_path / "run")
    (run / "resolved.yaml").write_text(f"name: run\ntrain: {{steps: 50, global_batch: {batch}}}\n")
    found = json.loads(stamo("status", run, "--json").removesuffix("set()\n"))[0]
    assert found["samples_per_second"] == pytest.approx(rate)


def test_speeds_name_what_they_are_of(tmp_path):
    """Status those of now, the report the run's, beside each other in the same units."""
    [found] = collect([started(tmp_path / "run")])
    console = Console(file=io.StringIO(), width=120)
    for state in (found.state, replace(found.state, word="running")):
        console.print(one_run(replace(found, state=state)))
    console.print(status_table([replace(found, state=state)]))
    said = console.file.getvalue()
    assert "128 samples/s at the end" in said
    assert "128 samples/s now" in said
    assert any("samples/s now" in line for line in said.splitlines() if "ETA  " in line)


def test_a_full_disk_is_named_as_the_log_cannot(tmp_path, monkeypatch):
    run = started(tmp_path / "run")
    monkeypatch.setattr("stamo_dist.launch.status.os.statvfs", lambda path: SimpleNamespace(f_bavail=0))
    [found] = collect([run])
    assert found.state.word == "lost"
    assert found.state.detail.startswith(f"the disk of {run} is full: make room, then `stamo resume {run}` (")


def test_where_the_time_and_the_memory_go(tmp_path):
    run = started(tmp_path / "run")
    last = {
        "grad_norm": 1.25,
        "data_wait": 0.0125,
        "comm_wait": 0.0625,
        "mfu": 0.43,
        "peak_gb": 60.125,
        "reserved_gb": 71,
    }
    with (run / "metrics.jsonl").open("a") as f:
        f.write("\n" + json.dumps({"step": 13, "flow": 0.5, "lr": 1e-4, "seconds": 6.5, **last}) + "\n")
    said = stamo("status", run)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if line.strip()}
    assert rows["last"] == "loss 0.5000 lr 0.0001 grad_norm 1.25"
    assert rows["speed"] == "128 samples/s at the end, 0.5 s a step"
    assert rows["waiting"] == "1.2% for data, 6.2% for other ranks' gradients"
    assert rows["GPU"] == "MFU 43.0%, 60.12 GB in use at most, 71 GB reserved"
    assert max(len(line.rstrip()) for line in said.splitlines() if line.startswith(("last", "waiting", "GPU"))) <= 80


def test_names_and_folders_are_whole_at_any_width(tmp_path, monkeypatch):
    """As a table as wide as it is in a pipe; on a narrow terminal as a block a run."""
    name = "policy_openvla_state_of_a_long_name"
    started(tmp_path / "runs" / name)
    monkeypatch.setenv("COLUMNS", "60")
    for words in (["runs"], ["status"]):
        shown = stamo(*words)
        assert name in shown
        assert "12/50" in shown
    assert f" runs/{name}\n" in stamo("runs")
    narrow = Console(force_terminal=True, width=60, file=io.StringIO(), color_system=None)
    show(narrow, runs_table(collect(find([f"runs/{name}"]))))
    lines = narrow.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    for heading, value in (("run", name), ("folder", f"runs/{name}"), ("step", "12/50"), ("on", "local")):
        assert [heading, value] in [line.split() for line in lines]


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    for place in ("x/twice", "a/long/way/to/y/twice", "alone"):
        started(tmp_path / place)
    monkeypatch.setenv("COLUMNS", "80")
    lines = stamo("status").removesuffix("set()\n").splitlines()
    rows = [line.split()[:3] for line in lines]
    assert rows[0] == ["run", "folder", "state"]
    assert ["twice", "x/twice", "lost"] in rows
    assert ["twice", "y/twice", "lost"] in rows
    assert ["alone", "lost", "12/50"] in rows
    assert max(len(line) for line in lines[:4]) <= 80
    assert any(line.startswith("twice (y/twice): lost: ") for line in lines)
    assert "folder" not in stamo("status", tmp_path / "x", tmp_path / "alone")
    known = {run["run_dir"] for run in json.loads(stamo("status", "--json").removesuffix("set()\n"))}
    assert str(tmp_path / "x/twice") in known


def test_what_stamo_train_started_is_registered_and_says_where_its_output_is(tmp_path):
    run = RunFolder(tmp_path / "elsewhere" / "by_hand")
    run.prepare()
    run.describe("", "name: by_hand\ntrain: {steps: 5}\n", ["stamo", "train"], step=0, processes=1, sources={})
    assert "by_hand" in stamo("runs")
    assert "rank 0 printed into that terminal" in stamo("logs", "by_hand", code=2)
    (run.logs / "rank_00001.log").write_text("line of rank 1\n")
    shown = stamo("logs", "by_hand")
    assert "line of rank 1" in shown
    assert "rank 0 printed into that terminal" in shown


def test_measurements_take_the_name_of_a_run_too(tmp_path):
    run = RunFolder(tmp_path / "elsewhere" / "paints")
    run.prepare()
    run.describe("", dump(load("vae_demo").recipe), ["stamo", "train"], step=0, processes=1, sources={})
    said = stamo("eval", "reconstruct", "paints", code=2)
    assert f"{run.path}: its recipe trains the vae stage; give the run folder of a tokenizer" in said
    assert "no run folder and no name of a run" in stamo("eval", "reconstruct", "draws", code=2)


def test_a_local_run_is_watched_and_cancelled(tmp_path, monkeypatch):
    """The process leaves with code 75 when it is asked to, as a training does."""
    waits = "import os, signal\nif 'RANK' in os.environ: signal.sigwait({signal.SIGTERM}), os._exit(75)\n"
    (tmp_path / "sitecustomize.py").write_text(waits)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = tmp_path / "run"
    launch = Launch(name="waits", run_dir=str(run), recipe="", command=["train", "any.yaml"])
    launch.write()
    record(run, Event("submitted"))
    launch.job_ids.append(supervise.start([run]))
    launch.write()
    deadline = time.monotonic() + 20
    while "starting" not in (shown := stamo("status", "waits")):
        assert time.monotonic() < deadline, shown
    assert "was not submitted; `stamo train" in stamo("resume", started(tmp_path / "by hand"), code=2)
    assert "is starting already" in stamo("resume", "waits", code=2)
    assert "not started again" in stamo("cancel", "waits")
    while supervisor.supervised(run):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)
    assert "cancelled" in stamo("status", run, "--watch"), "which ends, as the run has"
    assert "nothing to cancel" in stamo("cancel", run)
    assert "--- start 1 of job" in stamo("logs", run, "--follow")


def test_a_table_of_hundreds_is_laid_out_as_any_other():
    """`Columns` prints what `Whole` does, but for blanks at the ends of lines."""
    columns = {"run": ["a", "運転"], "state": [Text("finished", style="bold green"), ""], "nodes": ["", "n1 × 2"]}
    cells = {name: [c if isinstance(c, Text) else Text(c) for c in of_rows] for name, of_rows in columns.items()}
    table = Table(*cells, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    for width in (80, 18):
        printed = []
        for shown in (Whole(table), Columns(cells)):
            console = Console(force_terminal=True, width=width, file=io.StringIO(), color_system="standard")
            show(console, shown)
            lines = [Text.from_ansi(line).plain.rstrip() for line in console.file.getvalue().splitlines()]
            printed.append(list(filter(None, lines)))
            assert "\x1b[1;32mfinished" in console.file.getvalue()
        assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("train", "steps", "speed"),
    [
        ("train: {steps: 50, global_batch: 64}", 50, 128),
        (
            "train:  # of mine\n\n  # more\n  steps: 50   # here\n  global_batch:\n    0: 64\n    11: 8\n  ema: 1",
            50,
            16,
        ),
        (
            "train:\n   profile:\n      steps: 3\n      global_batch: 1\n   steps: 50\n   global_batch: 8",
            50,
            16,
        ),
        ("train:\n  ema: 1\n", None, 1),
        ("train:\n", None, 1),
    ],
)
def test_what_is_read_of_a_resolved_recipe(tmp_path, train, steps, speed):
    run = started(tmp_path / "run")
    (run / "resolved.yaml").write_text(f"name: other\n{train}\nstrategy:\n  steps: 7\n")
    progress = read_progress(run)
    assert (progress.name, progress.steps, progress.rate) == ("other", steps, pytest.approx(speed))


def test_folders_that_have_to_be_waited_for_are_read_side_by_side():
    def read(number: int) -> tuple[int, int]:
        time.sleep(0.005)
        return number, threading.get_ident()

    found = _each(read, range(200))
    assert [number for number, _ in found] == list(range(200))
    assert len({thread for _, thread in found}) > 8
