"""`stamo eval rollout` and `plan` with real processes and real (tiny) models, in a world whose outcomes are known."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from point_world import PointBenchmarks
from toy_policy import write_policy_recipe

from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import DataError, RunError
from stamo_dist.evaluate import closed_loop
from stamo_dist.evaluate.features import STATE
from stamo_dist.evaluate.options import ShowOptions
from stamo_dist.evaluate.plan import AGENTS, GoalPlanning
from stamo_dist.evaluate.rollout import PolicyAgent, PolicyRollout
from stamo_dist.evaluate.shown import PolicyView
from stamo_dist.evaluate.simulators import Setting
from stamo_dist.evaluate.successes import difference, interval
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.policies import load_policy
from stamo_dist.recipe.load import load
from stamo_dist.report import write_report
from stamo_dist.tasks import build_task

TASKS = ("suite/one", "suite/two")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, toy_policy: Path, stamo: Callable[..., Any]) -> Path:
    recipe = write_policy_recipe(tmp_path_factory.mktemp("policy") / "toy.yaml", toy_policy)
    stamo("train", recipe, "--set", "train.steps=2", "--set", "train.checkpoint.every=2")
    return recipe.parent / "run"


def test_rollout_counts_resumes_and_is_shared_out(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"tasks": TASKS, "benchmark": "toy", "size": 32, "max_steps": 2, "processes": 2}
    whole = PolicyRollout(
        str(policy), benchmarks=PointBenchmarks(), trials=3, out=tmp_path / "whole", **options
    ).evaluate()
    assert whole is not None
    assert [(r["task"], r["trials"], r["success"], r["steps"]) for r in whole.rows] == [
        ("one", 3, pytest.approx(200 / 3), 1.5), ("two", 3, pytest.approx(200 / 3), 1.5),
        ("all tasks", 6, pytest.approx(200 / 3), 1.5),
    ]  # fmt: skip
    sides = [(figure.task, figure.side) for figure in whole.figures]
    tasks = [f"suite/{name}: 2 of 3 succeeded" for name in ("one", "two")]
    assert sides == [(task, side) for task in tasks for side in ("succeeded", "failed")]
    kept = list((tmp_path / "whole").glob("trials/*/*/*.gif"))
    assert len(kept) == 4, "--videos of each task's successes, and of its failures"
    with Image.open(tmp_path / "whole" / whole.figures[1].file) as video:
        assert video.n_frames == 2, "the policy looks once before its chunk of two actions"
    table = list(csv.DictReader((tmp_path / "whole" / "rollout_suites.csv").open()))
    assert table[0]["suite"] == table[0]["mean"] == str(200 / 3)

    looks, act = 0, PolicyAgent.act

    def counted(self: PolicyAgent, seen: Any, *more: Any) -> Any:
        nonlocal looks
        looks += len(seen)
        return act(self, seen, *more)

    monkeypatch.setattr(PolicyAgent, "act", counted)
    monkeypatch.setattr(closed_loop, "wait", lambda pipes: pipes[:1])  # so a kill leaves some trials done
    shared = {**options, "out": tmp_path / "shared", "trials": 3, "num_slices": 2}
    assert PolicyRollout(str(policy), benchmarks=PointBenchmarks(), slice=1, **shared).evaluate() is None
    mine = len(list((tmp_path / "shared").glob("trials/*/*/*.json")))
    assert mine == 3
    again = PolicyRollout(str(policy), benchmarks=PointBenchmarks(), slice=0, **shared).evaluate()
    assert again is not None
    assert again.rows == whole.rows
    before = looks
    more = PolicyRollout(
        str(policy), benchmarks=PointBenchmarks(), **{**options, "out": tmp_path / "shared", "trials": 4}
    ).evaluate()
    assert more is not None
    assert more.rows[2]["trials"] == 8
    assert looks - before == 2, "two trials of one look were missing"


def test_beside_random_actions_and_the_expert(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"tasks": TASKS, "max_steps": 2, "processes": 2, "trials": 3, "out": tmp_path / "out"}
    told: list[str] = []
    batch = Policy.act_batch

    def heard(self: Policy, images: Any, instructions: Any, **more: Any) -> Any:
        told.extend(instructions)
        return batch(self, images, instructions, **more)

    monkeypatch.setattr(Policy, "act_batch", heard)
    found = PolicyRollout(str(policy), benchmarks=PointBenchmarks(), baselines=True, **options).evaluate()
    assert found is not None
    assert set(told) == {"move the square"}
    # Trial n is solved by n + 1 steps, whoever takes them, and nobody has more than two.
    assert [(r["task"], r["agent"], r["trials"], r["success"]) for r in found.rows[6:]] == [
        ("all tasks", agent, 6, pytest.approx(200 / 3)) for agent in ("toy_policy", "random actions", "the expert")
    ]
    assert len(found.figures) == 4, "videos are the policy's alone"
    told.clear()
    shuffled = PolicyRollout(str(policy), benchmarks=PointBenchmarks(), shuffle_instructions=True, **options).evaluate()
    assert shuffled is not None
    assert shuffled.title == "Rollouts of the policy, each task told the next one's instruction"
    assert set(told) == {"move the square of suite/one", "move the square of suite/two"}
    with pytest.raises(RunError, match="these tasks have one instruction"):
        PolicyRollout(
            str(policy), benchmarks=PointBenchmarks(), shuffle_instructions=True, **{**options, "tasks": TASKS[:1]}
        ).evaluate()


def test_what_cannot_be_rolled_out_is_said(policy: Path, tmp_path: Path):
    options: dict[str, Any] = {"tasks": TASKS, "benchmark": "toy", "size": 32, "out": tmp_path / "out", "processes": 1}
    for changed, error, says in (
        ({"benchmark": "libero"}, RunError, r"was trained on a \(toy\), not on libero; choose another --benchmark"),
        ({"benchmark": "libero", "unnorm_key": "a"}, DataError, "install -e '"),
        ({"trials": 10}, DataError, "has 9 initial states"),
        ({"slice": 2, "num_slices": 2}, RunError, "--slice 2: must be between"),
        ({"actions": "radians"}, RunError, "--actions radians: must be one of delta, original, openvla"),
        ({"cameras": ("a", "b")}, RunError, "looks at 1 view of a moment, and a, b are 2; name 1"),
        ({"tasks": ("suite/broken",)}, DataError, "suite/broken: the simulator broke"),
        ({"unnorm_key": "droid"}, DataError, "droid"),
    ):
        with pytest.raises(error, match=says):
            PolicyRollout(str(policy), benchmarks=PointBenchmarks(), **{**options, "trials": 1, **changed}).evaluate()


def test_a_policy_is_shown_what_it_was_trained_on(toy_policy: Path, tmp_path: Path) -> None:
    """Benchmark, camera, size and statistics are its folder's; frames are drawn as the dataset's were, then resized."""
    root = tmp_path / "data"
    shutil.copytree(toy_policy, root)
    path = root / "shards/a/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "frame_size": [64, 64]}))
    recipe = load(write_policy_recipe(tmp_path / "toy.yaml", root)).recipe
    task = build_task(recipe, Mixture(recipe.data, seed=0, global_batch=8))
    task.export(tmp_path / "model", dict(task.trained.state_dict()), [])
    shown = PolicyView.to(str(tmp_path / "model"), PointBenchmarks(), ShowOptions(actions="delta"))
    assert (shown.benchmark, shown.setting) == ("toy", Setting(32, ("front",), "delta", rendered=64))
    loaded = load_policy(tmp_path / "model")
    assert shown.sources_of(["suite/one"], loaded) == {"suite/one": "a"}
    assert (
        shown.said(shown.with_views(1, named=False), loaded.framing)
        == "toy: front drawn at 64 px, seen at 32 px, upright, no crop"
    )
    with pytest.raises(RunError, match="looks at 2 views of a moment, and front is 1; name 2"):
        shown.with_views(2, named=False)

    other = PolicyView.to(str(tmp_path / "model"), PointBenchmarks(), ShowOptions(cameras=["top"], size=48))
    assert other.setting == Setting(48, ("top",), "delta")
    statistics = json.loads((tmp_path / "model/dataset_statistics.json").read_text())
    (tmp_path / "model/dataset_statistics.json").write_text(json.dumps({"a": {"proprio": statistics["a"]["action"]}}))
    with pytest.raises(DataError, match=r"a.action is missing; compute it with `stamo data stats`"):
        shown.sources_of(["suite/one"], load_policy(tmp_path / "model"))


def test_plan_of_a_run(run: Path, toy: SimpleNamespace, tmp_path: Path):
    shards = shutil.copytree(toy.shards, tmp_path / "shards")
    for name in ("a", "b"):
        path = shards / name / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "convention": "end-effector delta: of a toy"}))
    with pytest.raises(DataError, match="the simulators take deltas; convert it"):
        GoalPlanning(run, benchmarks=PointBenchmarks(), tasks=["suite/one"]).evaluate()
    recipe = run / "resolved.yaml"
    recipe.write_text(recipe.read_text().replace(str(toy.shards), str(shards)))
    options: dict[str, Any] = {"tasks": ["suite/one"], "k": 2, "epochs": 1, "processes": 2, "max_steps": 2}
    result = GoalPlanning(run, benchmarks=PointBenchmarks(), trials=3, videos=1, **options).evaluate()
    assert [row["agent"] for row in result.rows] == list(AGENTS)
    assert all(row["trials"] == 3 and row["success"] == pytest.approx(200 / 3) for row in result.rows)
    assert result.partial is None
    assert len(result.figures) == len(AGENTS)
    with Image.open(run / "eval" / "plan" / result.figures[0].file) as video:
        assert video.size == (2 * 144, 144), "the goal beside the robot"
    assert any(note.startswith(f"suite/one: {STATE} 67 %, level with") for note in result.notes)
    assert "Goal-conditioned planning" in write_report([run]).read_text()
    with pytest.raises(DataError, match="no source with actions of c; the recipe has a"):
        GoalPlanning(run, benchmarks=PointBenchmarks(), source=["c"], **options).evaluate()
    # Several tasks and sources: the head learns on all of them, and the last rows are those of all tasks.
    assert result.settings["source"] == "a, b"
    two = {**options, "tasks": ["suite/one", "suite/two"]}
    more = GoalPlanning(run, benchmarks=PointBenchmarks(), trials=3, source=["b", "a"], **two).evaluate()
    assert more.settings["source"] == "a, b"
    assert [row["task"] for row in more.rows] == [t for t in ("suite/one", "suite/two", "all tasks") for _ in AGENTS]
    whole = more.rows[-1]
    assert whole["trials"] == 6
    assert whole["success"] == pytest.approx((more.rows[-1 - len(AGENTS)]["success"] + 200 / 3) / 2)
    assert any(note.startswith("all tasks: ") for note in more.notes)
    alone = GoalPlanning(run, benchmarks=PointBenchmarks(), trials=3, source=["b"], **options).evaluate()
    assert (alone.settings["source"], len(alone.rows)) == ("b", len(AGENTS))


def test_intervals_are_wilsons_and_newcombes():
    rows = [
        dict(zip(("success", "low", "high"), (100 * g / n, *interval(g, n)), strict=True))
        for g, n in ((56, 70), (48, 80))
    ]
    assert difference(*rows) == pytest.approx((20.0, 5.24, 33.39), abs=0.02), "the paper's example (a)"
    assert interval(8, 10) == pytest.approx((49.0, 94.3), abs=0.1)
    assert interval(0, 20)[0] == 0
