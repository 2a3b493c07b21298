"""Drawn episodes, for a first try without a simulator: a gripper carries a disc over a table to a mark.

A task in LIBERO's HDF5 layout with its actions; seen from above, in 2-D.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.simulators.demo_file import assemble, whole_file, write_episode
from data_tools.simulators.rollout import Rollout

TASK = "carry_the_disc_to_the_mark"
CAMERA = "top"
RATE_HZ = 10
LENGTH = 40
_RESTS = 6  # steps in which the hand moves less than it could, or not at all
_TABLE = 0.4  # metres that a frame spans
_STEP = 0.05  # metres of an action of 1, as LIBERO's controller has it
_GROUND, _MARK, _DISC, _HAND = (90, 110, 120), (200, 190, 90), (190, 60, 50), (30, 30, 40)


def write_drawn(path: Path, *, episodes: int, size: int, seed: int = 0) -> None:
    """Write a file of `episodes` of LENGTH steps each, with frames of `size` pixels a side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        parts = {k: temporary.with_name(f"{temporary.name}.{k}") for k in range(episodes)}
        try:
            for k, part in parts.items():
                rollout = _rollout(np.random.default_rng([seed, k]))
                write_episode(part, rollout, {CAMERA: _draw(rollout.states, size)}, k)
            assemble(
                temporary,
                parts,
                {
                    "problem_info": f'{{"language_instruction": "{TASK.replace("_", " ")}"}}',
                    "env_args": "{}",
                    "rate_hz": float(RATE_HZ),
                },
            )
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


def _rollout(rng: np.random.Generator) -> Rollout:
    """One episode; a state is the hand's, the disc's and the mark's x and y in metres, and the gripper's opening."""
    hand, disc, mark = rng.uniform(0.15 * _TABLE, 0.85 * _TABLE, (3, 2))
    way = np.abs(disc - hand).max() + np.abs(mark - disc).max()
    fastest = way / _STEP / (LENGTH - _RESTS)
    closed, states, actions = False, [], []
    for _ in range(LENGTH):
        goal = mark if closed else disc
        step = np.clip((goal - hand) / _STEP, -fastest, fastest)
        near = bool(np.abs(goal - hand).max() < 0.005)
        states.append([*hand, *disc, *mark, 0.0 if closed else 1.0])
        closed = closed or near
        actions.append([*step, 0, 0, 0, 0, 1.0 if closed else -1.0])
        hand = hand + step * _STEP
        disc = hand if states[-1][-1] == 0 else disc
    table = np.array(states)
    pose = np.concatenate([table[:, :2], np.zeros((LENGTH, 4))], axis=1)
    fingers = 0.04 * table[:, -1:] * np.array([1, -1])
    return Rollout(
        success=True,
        actions=np.array(actions),
        states=table,
        robot_states=table[:, :2],
        obs={"ee_states": pose, "gripper_states": fingers},
    )


def _draw(states: np.ndarray, size: int) -> np.ndarray:
    """(T, size, size, 3) uint8."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * _TABLE
    frames = np.empty((len(states), size, size, 3), np.uint8)
    for frame, (hx, hy, dx, dy, mx, my, opening) in zip(frames, states, strict=True):
        frame[:] = _GROUND
        frame[np.maximum(abs(x - mx), abs(y - my)) < 0.04] = _MARK
        frame[np.hypot(x - dx, y - dy) < 0.03] = _DISC
        gap = 0.02 + 0.015 * opening
        frame[(abs(abs(x - hx) - gap) < 0.007) & (abs(y - hy) < 0.03)] = _HAND
    return frames
