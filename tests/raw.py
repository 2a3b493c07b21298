"""A small dataset in robomimic's layout, to be converted."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

_CONTROLLER = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3, "control_delta": True,
}  # fmt: skip


def write_raw(path: Path, episodes: int = 6, length: int = 10) -> Path:
    """One HDF5 file with a camera of 32 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    kwargs = {"robots": ["Panda"], "control_freq": 20, "controller_configs": _CONTROLLER}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = episodes * length
        data.attrs["env_args"] = json.dumps(
            {"env_name": "Can", "type": 1, "env_version": "1.4.1", "env_kwargs": kwargs}
        )
        for k in range(episodes):
            demo = data.create_group(f"demo_{k}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["states"] = rng.normal(size=(length, 20))
            demo["obs/robot0_eef_pos"] = rng.normal(size=(length, 3))
            demo["obs/robot0_eef_quat"] = np.tile([0, 0, np.sqrt(0.5), np.sqrt(0.5)], (length, 1))
            demo["obs/robot0_gripper_qpos"] = rng.normal(size=(length, 2))
            demo["obs/agentview_image"] = rng.integers(0, 255, (length, 32, 32, 3), np.uint8)
    return path
