"""Writing LIBERO's HDF5 layout: first one part file per episode, then one file per task.

TASK_demo.hdf5
  data/                       attrs: problem_info, bddl_file_name, env_args, num_demos, total, …
    demo_0/                   attrs: num_samples, attempt
      actions (T, A), states (T, S), robot_states (T, R), rewards (T,), dones (T,)
      obs/CAMERA_rgb (T, H, W, 3), ee_pos, ee_ori, ee_states, gripper_states, joint_states
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.simulators.rollout import Rollout

#: Image timing and orientation of our files; stated in the `data` group, read by the converter.
CONVENTIONS = {
    "image_timing": "before",  # obs[t] was taken before actions[t]
    "image_orientation": "flipped_vertically",  # as LIBERO's own files; image[::-1] is upright
    "macros_image_convention": "opengl",
    "tag": "stamo-dist",
}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block succeeds, and removed when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_episode(path: Path, rollout: Rollout, frames: Mapping[str, np.ndarray], attempt: int) -> None:
    """Write one episode's group into a file of its own; `frames` are upright (T, H, W, 3) uint8 by camera."""
    length = len(rollout.actions)
    last = np.arange(length) == length - 1
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["num_samples"] = length
        file.attrs["attempt"] = attempt
        for name, values in (
            ("actions", rollout.actions),
            ("states", rollout.states),
            ("robot_states", rollout.robot_states),
            ("rewards", last.astype(np.uint8)),
            ("dones", last.astype(np.uint8)),
        ):
            file[name] = values
        obs = file.create_group("obs")
        for name, values in rollout.obs.items():
            obs[name] = values
        for camera, images in frames.items():
            # One frame per chunk, for random access.
            obs.create_dataset(f"{camera}_rgb", data=images[:, ::-1], chunks=(1, *images.shape[1:]), compression="gzip")


def assemble(path: Path, parts: Mapping[int, Path | h5py.Group], attributes: Mapping[str, Any]) -> None:
    """Write `path` from the episodes of `parts` (attempt → part file or a group of the file being replaced)."""
    total = 0
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for index, attempt in enumerate(sorted(parts)):
            demo = data.create_group(f"demo_{index}")
            copy(parts[attempt], demo)
            total += int(demo.attrs["num_samples"])
        for name, value in sorted({**CONVENTIONS, **attributes, "num_demos": len(parts), "total": total}.items()):
            data.attrs[name] = value


def copy(source: Path | h5py.Group, target: h5py.Group) -> None:
    """Copy everything below a group or file, with attributes."""
    if isinstance(source, Path):
        with h5py.File(source, "r") as file:
            copy(file, target)
        return
    for name in source:
        source.copy(name, target)
    for name, value in source.attrs.items():
        target.attrs[name] = value
