"""A short LIBERO file cut from the real one; an S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from s3 import free_port, server, use

REAL = "libero_spatial_task2_128.hdf5"
FRAMES = (12, 15, 18)


@pytest.fixture(scope="session")
def cut(sample_data: Callable[[str], Path]) -> Callable[..., Path]:
    """cut(path, **attrs): the first frames of every real episode, with these attributes on `data` (None removes)."""

    def write(path: Path, **attrs: str | None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(sample_data(REAL)) as real, h5py.File(path, "w") as file:
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


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 server's URL."""
    with server(free_port()) as url:
        yield url


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """An empty bucket, with the environment that reaches it."""
    import boto3

    use(monkeypatch, s3)
    name = f"c{abs(hash(request.node.name))}"
    boto3.client("s3", endpoint_url=s3, region_name="us-east-1").create_bucket(Bucket=name)
    return boto3.resource("s3", endpoint_url=s3, region_name="us-east-1").Bucket(name)
