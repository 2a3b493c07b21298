"""ManiSkill's simulator: its episodes, converted, solve the task again through the closed loop."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import simplejpeg

from data_tools.convert.driver import convert

from stamo_dist import _streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import reader_from_json

from data_tools.formats.maniskill import ManiskillReader
from data_tools.simulators import maniskill_file
from data_tools.simulators.catalogue import InstalledBenchmarks
from data_tools.simulators.jobs import TaskJob
from data_tools.simulators.maniskill import VULKAN_FIX
from data_tools.simulators.maniskill_expert import across
from data_tools.simulators.rollout import Rollout
from data_tools.simulators.simulate import Recording, simulate
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError
from stamo_dist.evaluate.simulators import Setting

needs_maniskill = pytest.mark.skipif(
    importlib.util.find_spec("mani_skill") is None, reason="needs the [maniskill] extra: make maniskill"
)


def rollout(length: int, seed: int) -> tuple[Rollout, dict[str, np.ndarray]]:
    """An episode as the simulator gives it, with the frames of its camera."""
    rng = np.random.default_rng(seed)
    low = {
        "agent/qpos": rng.normal(size=(length + 1, 9)),
        "extra/tcp_pose": np.tile([0, 0, 0, 0, 1.0, 0, 0], (length + 1, 1)),
    }
    states = rng.normal(size=(length + 1, 70)).astype(np.float32)
    actions = rng.uniform(-1, 1, (length, 7))
    frames = {"base_camera": rng.integers(0, 256, (length + 1, 16, 16, 3), np.uint8)}
    return Rollout(True, actions, states, np.zeros((length, 0)), low, seed), frames


def test_the_reader_reads_what_is_written_and_more_is_added(tmp_path: Path) -> None:
    attributes = {
        "env_id": "PushCube-v1",
        "env_kwargs": json.dumps({"control_mode": "pd_ee_delta_pose", "robot_uids": "panda_wristcam"}),
        "instruction": "push cube",
    }
    options = {"benchmark": "maniskill", "size": 16}
    for episodes in (1, 2):
        job = TaskJob.open("PushCube-v1", tmp_path, options, episodes)
        attempt = episodes - 1
        assert job.next_attempt() == attempt
        job.outcomes[attempt] = True
        job.attributes.update(attributes)
        maniskill_file.write_episode(job.parts / f"{attempt:05d}.hdf5", *rollout(5 + attempt, attempt), attempt)
        job.write()
    scan = ManiskillReader(tmp_path).scan()
    assert [(e.key, e.length, e.instruction) for e in scan.episodes] == [
        ("traj_0", 5, "push cube"),
        ("traj_1", 6, "push cube"),
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim, scan.frame_size) == (["base_camera"], 20, 16, (16, 16))
    assert scan.action is not None
    assert (scan.action.mode, scan.action.radians) == ("delta", -0.1)
    written, frames = rollout(6, 1)
    read = ManiskillReader(tmp_path).read(scan.episodes[1])
    np.testing.assert_array_equal(read.actions, written.actions.astype(np.float32))
    np.testing.assert_array_equal(list(read.frames["base_camera"]([0, 5])), frames["base_camera"][[0, 5]])
    with pytest.raises(DataError, match=r"made with size 16 \(asked: 32\)"):
        TaskJob.open("PushCube-v1", tmp_path, {**options, "size": 32}, 2)


def test_the_hand_closes_across_the_nearest_sides() -> None:
    angle = np.deg2rad(100)
    turned = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    hand = np.diag([1.0, -1.0, -1.0])
    found = across(turned, hand)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found[:, 2], [0, 0, -1])
    assert found[:, 1] @ hand[:, 1] == pytest.approx(np.cos(np.deg2rad(10)))


@pytest.mark.sim
@needs_maniskill
def test_shards_solve_the_tasks_in_the_closed_loop(tmp_path: Path) -> None:
    """Actions, pictures, proprio and instruction of the shards are those of the simulator that is driven."""
    tasks = ["PickCube-v1"]
    recording = Recording("maniskill", size=64)
    try:
        made = simulate(recording, tmp_path / "raw", tasks=tasks, episodes=1, processes=1, quiet=True)
    except DataError as e:
        if VULKAN_FIX not in str(e):
            raise
        pytest.skip(VULKAN_FIX)
    assert made.files == [tmp_path / "raw" / f"{task}.h5" for task in tasks]
    source = tmp_path / "shards"
    manifest, _ = convert("maniskill", tmp_path / "raw", source, size=64, quality=100, val_fraction=0, quiet=True)
    assert (manifest.source_format, manifest.frame_size, manifest.proprio_dim) == ("maniskill", (64, 64), 16)
    index = json.loads((source / "train/base_camera/index.json").read_text())
    (shard,) = (reader_from_json(str(source / "train"), "base_camera", shard) for shard in index["shards"])
    episodes = read_episodes(source, "train")
    assert {episode.task for episode in episodes} == set(tasks)
    for episode in episodes:
        with h5py.File(tmp_path / "raw" / f"{episode.task}.h5") as file:
            seed = int(file["traj_0"].attrs["seed"])
        simulator = InstalledBenchmarks().open(
            "maniskill", episode.task, Setting(64, tuple(manifest.cameras), rendered=64)
        )
        simulator.reset(0)
        simulator._world._fresh(seed)  # type: ignore[attr-defined]
        solved = False
        for t in range(episode.start, episode.start + episode.length):
            moment = shard[t]
            if t % 4 == 0:
                seen = simulator.observe()
                picture = simplejpeg.decode_jpeg(moment["image"], "RGB")
                assert np.abs(seen.images[0].astype(int) - picture).mean() < 2
                np.testing.assert_allclose(seen.proprio, moment["proprio"], atol=1e-3)
                assert seen.instruction == episode.instruction
            solved = simulator.step(moment["action"]) or solved
        assert solved
        assert simulator.solve(3), "and the expert solves a trial"
        simulator.close()


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DataError) as caught:
        InstalledBenchmarks().resolve("maniskill", ["PikCube-v1"], Setting(64, ("base_cam",)))
    for text in ("no task 'PikCube-v1'; did you mean PickCube-v1", "no camera 'base_cam'; did you mean base_camera"):
        assert text in str(caught.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"maniskill is not installed: .*install -e '.*\[maniskill\]'"):
        InstalledBenchmarks().resolve("maniskill", ["PickCube-v1"], Setting(64, ("base_camera",)))
    assert not InstalledBenchmarks().checkable("maniskill")
