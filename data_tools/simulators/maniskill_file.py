"""Writing ManiSkill's own layout, as its RecordEpisode wrapper does: TASK.h5 with TASK.json beside it.

See `data_tools.formats.maniskill`, which reads it. The root's attributes hold the state from which `stamo data
simulate` continues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.simulators.demo_file import copy, whole_file
from data_tools.simulators.rollout import Rollout


def write_episode(path: Path, rollout: Rollout, frames: Mapping[str, np.ndarray], attempt: int) -> None:
    """Write one episode's group into a file of its own; `frames` are upright (T + 1, H, W, 3) uint8 by camera."""
    last = np.arange(len(rollout.actions)) == len(rollout.actions) - 1
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["num_samples"] = len(rollout.actions)
        file.attrs["attempt"] = attempt
        file.attrs["seed"] = rollout.seed
        file["actions"] = rollout.actions.astype(np.float32)
        file["success"] = file["terminated"] = last
        file["truncated"] = np.zeros_like(last)
        file["env_states/flat"] = rollout.states
        for name, values in rollout.obs.items():
            file[f"obs/{name}"] = values
        for camera, images in frames.items():
            file.create_dataset(
                f"obs/sensor_data/{camera}/rgb", data=images, chunks=(1, *images.shape[1:]), compression="gzip"
            )


def assemble(path: Path, parts: Mapping[int, Path | h5py.Group], attributes: Mapping[str, Any]) -> None:
    """Write `path` and its JSON from the episodes of `parts` (attempt → part file or a group of the old file)."""
    episodes = []
    with whole_file(path) as temporary:
        with h5py.File(temporary, "w") as file:
            for index, attempt in enumerate(sorted(parts)):
                trajectory = file.create_group(f"traj_{index}")
                copy(parts[attempt], trajectory)
                seed = int(trajectory.attrs["seed"])
                episodes.append(
                    {
                        "episode_id": index,
                        "episode_seed": seed,
                        "reset_kwargs": {"seed": seed, "options": {"reconfigure": True}},
                        "control_mode": json.loads(attributes["env_kwargs"])["control_mode"],
                        "elapsed_steps": int(trajectory.attrs["num_samples"]),
                        "success": True,
                        "instruction": attributes.get("instruction", ""),  # parts written by earlier versions have none
                    }
                )
            for name, value in sorted(attributes.items()):
                file.attrs[name] = value
        env = {"env_id": attributes["env_id"], "env_kwargs": json.loads(attributes["env_kwargs"])}
        told = {"env_info": env, "episodes": episodes, "source_type": "scripted"}
        with whole_file(path.with_suffix(".json")) as beside:
            beside.write_text(json.dumps(told, indent=1) + "\n")
