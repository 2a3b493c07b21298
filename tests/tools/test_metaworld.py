"""Meta-World episodes in the layout that `stamo data simulate metaworld` writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.formats.libero import HAND_DELTA, LiberoReader
from data_tools.formats.metaworld import MetaworldReader
from data_tools.simulators.demo_file import assemble, write_episode
from data_tools.simulators.metaworld import MetaWorld
from data_tools.simulators.rollout import Rollout
from stamo_dist.errors import DataError


def test_episode(tmp_path: Path) -> None:
    """The simulator's own attributes and writer; 1 is 1 cm, -1 opens, frames upright, 80 Hz."""
    length = 6
    rng = np.random.default_rng(0)
    rollout = Rollout(
        success=True,
        actions=rng.uniform(-1, 1, (length, 4)),
        states=rng.normal(size=(length, 30)),
        robot_states=rng.normal(size=(length, 9)),
        obs={"ee_states": rng.normal(size=(length, 6)), "gripper_states": rng.normal(size=(length, 2))},
    )
    images = rng.integers(0, 256, (length, 16, 16, 3), np.uint8)
    part = tmp_path / "part"
    write_episode(part, rollout, {"corner3": images}, attempt=0)
    assemble(tmp_path / "drawer-open-v3_demo.hdf5", {0: part}, attributes())

    with pytest.raises(DataError, match=r"actions are Meta-World's .*; is it `metaworld`"):
        LiberoReader(tmp_path).scan()
    reader = MetaworldReader(tmp_path)
    scan = reader.scan()
    assert (scan.rate_hz, scan.cameras, scan.episodes[0].instruction) == (80, ["corner3"], "drawer open")
    assert scan.frame_size == (16, 16)
    spec = scan.action
    assert spec is not None
    assert (spec.mode, spec.metres, spec.rotation, spec.gripper) == ("delta", 0.01, (), 3)
    assert (spec.gripper_open, spec.gripper_closed) == (-1, 1)
    data = reader.read(scan.episodes[0])
    np.testing.assert_array_equal(data.actions, rollout.actions)
    np.testing.assert_array_equal(np.stack(list(data.frames["corner3"](range(length)))), images)
    np.testing.assert_allclose(np.diff(data.times), 1 / 80)


def attributes() -> dict[str, object]:
    pytest.importorskip("metaworld", reason="needs the [sim] extra: pip install -e '.[sim]'")
    return MetaWorld("drawer-open-v3").attributes


def test_libero_is_refused(cut: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="7 dimensions, Meta-World's 4"):
        MetaworldReader(cut(tmp_path / "a_demo.hdf5")).scan()


def test_action_scale_is_the_simulators() -> None:
    """What 1 means is taken from the installed simulator's own source."""
    simulator = pytest.importorskip("metaworld.sawyer_xyz_env", reason="needs the [sim] extra: pip install -e '.[sim]'")
    default = inspect.signature(simulator.SawyerXYZEnv.__init__).parameters["action_scale"].default
    assert default == HAND_DELTA.metres
