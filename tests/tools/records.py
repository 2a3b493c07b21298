"""Writes small TFDS folders: protobuf and TFRecord framing, independent of the reader."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from PIL import Image


def varint(number: int) -> bytes:
    out = b""
    number &= (1 << 64) - 1
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(values: Any) -> bytes:
    """A list of bytes, or numbers: floats as float32, integers and booleans as int64."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, v) for v in values))
    values = np.asarray(values).ravel()
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(v)) for v in values)))


def example(features: Mapping[str, Any]) -> bytes:
    entries = (field(1, field(1, k.encode()) + field(2, feature(v))) for k, v in features.items())
    return field(1, b"".join(entries))


def masked(data: bytes) -> bytes:
    crc = crc32c.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict[str, Any]:
    return {"tensor": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encoding": encoding}}


def image(*shape: int, form: str = "png") -> dict[str, Any]:
    return {"image": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": "uint8", "encodingFormat": form}}


TEXT: dict[str, Any] = {"text": {}}


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} → nested featuresDict."""
    features: dict[str, Any] = {}
    for name in dict.fromkeys(key.split("/")[0] for key in leaves):
        below = {k.removeprefix(f"{name}/"): v for k, v in leaves.items() if k.startswith(f"{name}/")}
        features[name] = _tree(below) if below else leaves[name]
    return {"featuresDict": {"features": features}}


def write_tfds(
    folder: Path,
    name: str,
    steps: Mapping[str, Any],
    episodes: Sequence[Mapping[str, Any]],
    split: str = "train",
    shards: int = 1,
    metadata: Mapping[str, Any] = {},
) -> Path:
    """Write a TFDS folder; `steps` declares the features of a step, `episodes` hold their values by full name."""
    folder.mkdir(parents=True)
    declared = {
        "featuresDict": {
            "features": {
                "steps": {"sequence": {"feature": _tree(steps), "length": "-1"}},
                "episode_metadata": _tree({"file_path": TEXT} | {k.split("/")[-1]: v for k, v in metadata.items()}),
            }
        }
    }
    parts = [list(episodes[k::shards]) for k in range(shards)]
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "shardLengths": [str(len(part)) for part in parts],
            }
        ],
    }
    (folder / "features.json").write_text(json.dumps(declared))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, part in enumerate(parts):
        path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{shards:05d}"
        path.write_bytes(b"".join(record(example(episode)) for episode in part))
    return folder
