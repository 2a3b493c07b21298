"""Rollouts beside a policy's training: what is found is written, the best stays, and the training does not notice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from point_world import as_simulators
from toy_policy import write_policy_recipe
from warm import Warm

from stamo_dist.errors import RecipeError
from stamo_dist.evaluate.background import BackgroundRollouts
from stamo_dist.evaluate.successes import COLUMNS, interval
from stamo_dist.launch.aside import Processes
from stamo_dist.recipe.load import load
from stamo_dist.report import write_report
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.success import Successes
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.tracking.metrics_file import MetricsFile, read_late

ROLLOUT = """
evaluate:
  every: 2
  rollout: {benchmark: toy, tasks: [suite/one, suite/two], trials: 4, size: 32, max_steps: 2, processes: 1}
"""
SETTINGS = ["train.steps=6", "train.checkpoint.every=2", "train.checkpoint.keep=1", "train.ema=0.5"]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts commands; every process has the point world for its simulators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", as_simulators(tmp_path_factory.mktemp("site")))
        server = Warm(tmp_path_factory.mktemp("there"), os.environ)
        yield server
        server.close()


def written(path: Path, root: Path, more: str = ROLLOUT) -> Path:
    recipe = write_policy_recipe(path, root)
    recipe.write_text(recipe.read_text() + more)
    return recipe


def settings(*more: str) -> list[str]:
    return [word for s in (*SETTINGS, *more) for word in ("--set", s)]


def steps_of(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_the_training_is_the_same_to_the_bit(
    toy_policy: Path, there: Warm, ranks: Callable[..., Any], tmp_path: Path
) -> None:
    plain, beside = (written(tmp_path / name / "toy.yaml", toy_policy) for name in ("plain", "beside"))
    ranks(1, "train", plain, *settings("evaluate.every=null"))
    said = there.stamo("train", beside, *settings()).stdout
    run = beside.parent / "run"
    assert steps_of(run) == steps_of(plain.parent / "run")
    assert not (plain.parent / "run" / "eval").exists()
    assert said.index("exported") < said.index("success in closed loop 50 % (22–78) at step 6: 8 trials")

    late = read_late(run / "metrics.jsonl")
    assert {2, 6} <= late.keys() <= {2, 4, 6}, "of those that come due meanwhile the newest waits"
    low, high = interval(4, 8)
    found = {key.removeprefix("eval/rollout/"): value for key, value in late[6].items()}
    assert (found["success"], found["low"], found["high"], found["trials"]) == (50, low, high, 8)
    assert (found["one/success"], found["two/low"]) == (50, interval(2, 4)[0])

    assert Successes.read(run).best == Successes.read(run).last, "of equal ones the newer is the best"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000006"]
    status = there.stamo("status", run).stdout
    assert "50 % (22–78) at step 6, of 8 trials" in status
    assert "loss" in status
    videos = list((run / "eval" / "during").rglob("*.gif"))
    assert len(videos) == 2 * 2 * 2, "of two tasks a success and a failure, with the trial and for the page"
    page = write_report([run]).read_text()
    assert "suite/one: 2 of 4 succeeded" in page
    assert page.count("<h4>failed</h4>") == page.count("<h4>succeeded</h4>") == 2
    assert '<polygon class="band"' in page

    there.stamo("export", run, tmp_path / "best", "--checkpoint", "best")
    assert "from step 6 of 6" in (tmp_path / "best" / "README.md").read_text()


def test_a_kill_loses_and_repeats_nothing(toy_policy: Path, there: Warm, tmp_path: Path) -> None:
    recipe = written(tmp_path / "toy.yaml", toy_policy, ROLLOUT.replace("trials: 4", "trials: 9"))
    run = tmp_path / "run"
    more = settings("evaluate.every=6")
    training = there.start("train", recipe, *more)
    here = run / "eval" / "during" / "step_00000006"
    deadline = time.monotonic() + 240
    while len(done := sorted(here.glob("trials/*/*/*.json"))) < 2:
        assert time.monotonic() < deadline
        assert training.poll() is None, training.stdout.read_text()
        time.sleep(0.01)
    training.kill()
    rollout = json.loads((here / "request.json").read_text())["ticket"]["process"]["pid"]
    os.killpg(rollout, signal.SIGKILL)
    training.wait()
    assert not (here / "rollout.json").exists()
    before = {path: path.stat().st_mtime_ns for path in done}
    said = there.stamo("train", recipe, *more).stdout
    assert "continuing" in said
    assert "success in closed loop 22 % (9–45) at step 6: 18 trials" in said
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert [step for step, *_ in steps_of(run)] == [1, 2, 3, 4, 5, 6]
    lines = (run / "metrics.jsonl").read_text()
    assert lines.count("eval/rollout/success") == 1
    assert "already trained" in there.stamo("train", recipe, *more).stdout
    assert (run / "metrics.jsonl").read_text() == lines


def test_two_processes_and_a_rollout_that_breaks(toy_policy: Path, there: Warm, tmp_path: Path) -> None:
    recipe = written(tmp_path / "toy.yaml", toy_policy, ROLLOUT.replace("suite/two", "suite/broken"))
    said = there.stamo("train", recipe, "--nproc", "2", *settings("evaluate.every=6")).stdout
    assert said.count("step 6 could not be rolled out: suite/broken: the simulator broke; pip install it anew;") == 1
    assert "exported" in said
    assert read_late(tmp_path / "run" / "metrics.jsonl") == {}


class Hand(Processes):
    """A launcher whose rollouts end when the test says so, in place of processes."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: set[int] = set()
        self.stopped: list[int] = []

    def start(self, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
        self.begun.append(int(arguments[-1]))
        return {"step": int(arguments[-1]), "log": str(folder / "log.txt")}

    def alive(self, ticket: dict[str, Any]) -> bool:
        return ticket["step"] not in self.ended

    def stop(self, ticket: dict[str, Any]) -> None:
        self.stopped.append(ticket["step"])


class Told:
    """What of a run's logger is needed."""

    def __init__(self, run: RunFolder, step: int):
        self.lines: list[str] = []
        self._run, self._file = run, MetricsFile(run.metrics, step)

    def info(self, text: str) -> None:
        self.lines.append(text)

    def log_late_eval(self, step: int, numbers: dict[str, float]) -> None:
        self._file.write({"step": step, **numbers})

    def late_steps(self) -> set[int]:
        return RunLogger.late_steps_of(self._run)


class Bench:
    """A run folder in which checkpoints are saved and rollouts end as the test says."""

    def __init__(self, run: Path, recipe: Path):
        self.run, self.recipe = RunFolder(run), load(recipe, ["train.checkpoint.every=1000", "evaluate.every=1000"])
        run.mkdir()
        self.start(0)

    def start(self, step: int) -> None:
        self.hand = Hand()
        self.rollouts = BackgroundRollouts(self.run, self.recipe.recipe, self.hand)
        self.journal = Told(self.run, step)
        self.rollouts.begin(step, self.journal)  # type: ignore[arg-type]

    def save(self, step: int, version: str = "") -> None:
        folder = self.run.checkpoints / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.json").write_text(json.dumps({"sha256": f"{step}{version}"}))
        self.rollouts.saved(step)
        self.settle()

    def end(self, step: int, good: int | None) -> None:
        """Of ten trials; None: without a result."""
        folder = self.run.evaluations / "during" / f"step_{step:08d}"
        low, high = interval(good or 0, 10)
        row = {"trials": 10, "success": 10.0 * (good or 0), "low": low, "high": high, "steps": None}
        provenance = dict.fromkeys(
            ("recipe", "data_fingerprint", "checkpoint", "trained_commit", "git_commit", "command", "date"), "x"
        )
        result = {
            "rows": [{"suite": "s", "task": "t", **row}, {"suite": "s", "task": "all tasks", **row}],
            "settings": {}, "figures": [], "provenance": {**provenance, "step": step, "ema": True, "seed": 0},
        }  # fmt: skip
        assert row.keys() == COLUMNS.keys()
        if good is None:
            (folder / "log.txt").write_text("Traceback …\nerror: no headless OpenGL\n  second line\n")
        else:
            (folder / "rollout.json").write_text(json.dumps(result))
        self.hand.ended.add(step)
        self.settle()

    def settle(self) -> None:
        for _ in range(4):
            if self.rollouts._running is not None:
                self.rollouts._running.looked = -1e9
                if self.rollouts._running.asked is not None:
                    self.rollouts._running.asked.exception()
            self.rollouts.poll()


@pytest.fixture
def bench(toy_policy: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench", written(tmp_path / "toy.yaml", toy_policy))


def test_the_newest_waits_and_the_best_stays(bench: Bench) -> None:
    bench.save(1000)
    bench.save(2000)
    assert bench.rollouts.needed() == {1000, 2000}, "their checkpoints stay while they are read"
    bench.save(3000)
    assert bench.journal.lines == ["step 2000 is not rolled out: step 1000 still is"]
    bench.end(1000, 7)
    assert bench.hand.begun == [1000, 3000]
    bench.end(3000, 7)
    found = Successes.read(bench.run.path)
    assert (found.best and found.best.step, found.last and found.last.step) == (3000, 3000)
    bench.save(4000)
    bench.end(4000, 2)
    found = Successes.read(bench.run.path)
    assert (found.best and found.best.step, found.last and found.last.step) == (3000, 4000)
    assert bench.rollouts.needed() == set()
    assert sorted(read_late(bench.run.metrics)) == [1000, 3000, 4000]


def test_what_breaks_is_said_once_and_stops_nothing(bench: Bench) -> None:
    bench.save(1000)
    bench.end(1000, None)
    log = bench.run.evaluations / "during" / "step_00001000" / "log.txt"
    assert bench.journal.lines == [f"step 1000 could not be rolled out: no headless OpenGL; see {log}"]
    bench.save(2000)
    assert bench.hand.begun == [1000, 2000]
    bench.end(2000, None)
    bench.start(2000)
    assert bench.hand.begun == [2000], "a new start tries the newest once more"
    assert bench.journal.lines == []


def test_a_new_start_goes_on(bench: Bench) -> None:
    bench.save(1000)
    bench.save(2000)
    bench.start(2000)  # as after a kill; the first rollout runs on
    bench.settle()
    assert bench.hand.begun == []
    bench.end(1000, 5)
    bench.settle()
    assert bench.hand.begun == [2000]
    bench.rollouts.close()
    assert bench.hand.stopped == [2000]
    assert bench.journal.lines[-1] == "the rollout of step 2000 goes on at the next start"
    assert bench.rollouts.pending(2000)

    bench.start(1000)  # from before it
    assert not (bench.run.evaluations / "during" / "step_00002000").exists()
    bench.save(2000, "other")
    bench.end(2000, 6)
    assert sorted(read_late(bench.run.metrics)) == [1000, 2000]
    assert not bench.rollouts.pending(2000)


def test_a_recipe_that_asks_for_the_impossible(toy_policy: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path / "toy.yaml", toy_policy)
    every = "train.checkpoint.every=2"
    for changed, says in (
        (["evaluate.rollout=null"], ["evaluate.rollout: is missing, and evaluate.every rolls a policy out"]),
        (
            ["evaluate.every=3", "evaluate.rollout.cameras=[a, b]", "evaluate.rollout.cluster=h100"],
            [
                "3 is no multiple of",
                "evaluate.rollout.cameras: the policy looks at 1 views",
                "set evaluate.rollout.where",
            ],
        ),
        (["evaluate.rollout.trials=0", "evaluate.rollout.where=moon"], ["trials: must be", "where: must be"]),
        (["stage=tokenizer"], ["evaluate.rollout: only a policy is rolled out"]),
    ):
        with pytest.raises(RecipeError) as refused:
            load(recipe, [every, *changed])
        assert all(words in str(refused.value) for words in says), str(refused.value)
