"""A short LIBERO file cut from the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

REAL = "libero_spatial_task2_128.hdf5"
FRAMES = (12, 15, 18)


@pytest.fixture(scope="session")
def cut(shared_data: Callable[[str], Path]) -> Callable[..., Path]:
    """cut(path, **attrs): the first frames of every real episode, with these attributes on `data` (None removes)."""

    def write(path: Path, **attrs: str | None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(shared_data(REAL)) as real, h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs.update(real["data"].attrs)
            for name, value in {"image_timing": "before", **attrs}.items():
                if value is None:
                    data.attrs.pop(name, None)
                else:
                    data.attrs[name] = value
            for index, length in enumerate(FRAMES):
                demo = real[f"data/demo_{index}"]
                for key in ("actions", "states", "obs/agentview_rgb", "obs/ee_states", "obs/gripper_states"):
                    file[f"data/demo_{index}/{key}"] = demo[key][:length]
        return path

    return write
