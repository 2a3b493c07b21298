"""Reading the metadata of a TFDS folder: dataset_info.json (splits, files) and features.json (names, shapes, types)."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats import tfrecord
from data_tools.formats.checked import a_list, an_object, list_at, read_object, shown, text_at, whole
from data_tools.formats.source import walk
from stamo_dist.errors import DataError

INFO, FEATURES = "dataset_info.json", "features.json"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
#: Splits that hold validation data under another name.
VAL_NAMES = ("val", "valid", "validation")


#: Upper bound on the stated number of episodes of a shard.
LONGEST_SHARD = 1_000_000
#: A shorter row of numbers is not taken for text.
CHARACTERS = 16


@dataclass(frozen=True)
class TfdsFeature:
    """One leaf of features.json.

    Attributes:
        kind: "image", "text", "tensor" or "other".
        shape: Of one element; -1 where unknown.
        dtype: As declared; floats of any width are stored as float32.
        encoding: Of an image "png", "jpeg" or "" (either); of a tensor "none", "bytes" or "zlib".
        depth: Number of enclosing sequences; the steps of an episode are one.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    depth: int

    @property
    def is_picture(self) -> bool:
        """RGB frames: encoded, or raw pixels."""
        return self.dtype == "uint8" and len(self.shape) == 3 and self.shape[2] in (3, -1) and self.depth == 1

    @property
    def is_text(self) -> bool:
        """A string, or an array of character codes."""
        characters = self.dtype in ("int32", "int64", "uint8") and len(self.shape) == 1 and self.size >= CHARACTERS
        return self.kind == "text" or (self.kind == "tensor" and (self.dtype in ("string", "object") or characters))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = "×".join("?" if n < 0 else str(n) for n in self.shape)
        encoding = f", {self.encoding}" if self.encoding not in ("", "none") else ""
        return f"{self.kind if self.kind == 'text' else self.dtype}{f' {shape}' if shape else ''}{encoding}"


@dataclass(frozen=True)
class Shard:
    split: str
    number: int  # within the split
    path: Path
    episodes: int | None  # as stated in dataset_info.json


@dataclass(frozen=True)
class Dataset:
    """A TFDS folder of one version."""

    name: str
    folder: Path
    shards: tuple[Shard, ...]
    features: Mapping[str, TfdsFeature]

    @cached_property
    def steps(self) -> dict[str, TfdsFeature]:
        """The features of a step by their names below `steps/`."""
        return {k.removeprefix("steps/"): f for k, f in self.features.items() if k.startswith("steps/")}


def open_dataset(src: Path) -> Dataset:
    """Read a folder that holds dataset_info.json, or one above it.

    Raises:
        DataError: There is none, more than one, or it has an unknown form.
    """
    if not src.is_dir():
        raise DataError(f"{src}: no such folder; give a TFDS folder, NAME/VERSION, with {INFO}")
    folders = [src] if (src / INFO).is_file() else [p.parent for p in walk(src) if p.name == INFO]
    if not folders:
        raise DataError(f"{src}: no {INFO} here or below: not a TFDS folder")
    if len(folders) > 1:
        found = ", ".join(str(f.relative_to(src)) for f in folders)
        raise DataError(f"{src}: {len(folders)} datasets or versions; convert one at a time: {found}")
    folder = folders[0]
    for name in (INFO, FEATURES):
        if not (folder / name).exists():
            raise DataError(f"{folder / name}: missing")
    info, declared = read_object(folder / INFO), read_object(folder / FEATURES)
    form = info.get("fileFormat", "tfrecord")
    if form != "tfrecord":
        raise DataError(f"{folder / INFO}: fileFormat {form!r} is not read; write it again with file_format=tfrecord")
    name = text_at(info, "name", str(folder / INFO)) or folder.parent.name
    try:
        leaves = dict(_leaves(declared, "", 0))
    except DataError as e:
        raise DataError(f"{folder / FEATURES}: {e}") from e
    if not any(key.startswith("steps/") for key in leaves):
        raise DataError(
            f"{folder / FEATURES}: no feature below `steps` in featuresDict: not RLDS; it has "
            f"{', '.join(leaves) or 'none'}"
        )
    if not (shards := tuple(_shards(folder, name, info))):
        raise DataError(f"{folder / INFO}, splits: no file in any shardLengths, and no *.tfrecord-* without them")
    return Dataset(name, folder, shards, leaves)


def _shards(folder: Path, name: str, info: Mapping[str, Any]) -> Iterator[Shard]:
    """The files of every split, in stored order; for an older dataset_info.json without splits, the existing files."""
    splits = list_at(info, "splits", f"{folder / INFO}")
    names: set[str] = set()
    for place, split in enumerate(splits):
        where = f"{folder / INFO}, splits.{place}"
        split_name = text_at(an_object(split, where), "name", where)
        if not re.fullmatch(r"[^\x00-\x1f/\u2028]+", split_name) or split_name in names:
            raise DataError(f"{where}, name: must be a name that no other split has, not {shown(split.get('name'))}")
        names.add(split_name)
        stated = a_list(split.get("shardLengths"), f"{where}, shardLengths")
        lengths = [whole(n, f"{where}, shardLengths") for n in stated]
        if any(n > LONGEST_SHARD for n in lengths):
            raise DataError(f"{where}, shardLengths: {max(lengths)} is more than a shard has")
        template = text_at(split, "filepathTemplate", where) or DEFAULT_TEMPLATE
        for number, episodes in enumerate(lengths):
            file = template
            for key, value in _file_name_parts(name, split_name, number, len(lengths)).items():
                file = file.replace(f"{{{key}}}", value)
            yield Shard(split_name, number, folder / file, episodes)
    if not splits:
        for path in sorted(folder.glob("*.tfrecord-*")):
            match = re.match(r".*-(\w+)\.tfrecord-(\d+)-of-\d+$", path.name)
            if match:
                yield Shard(match[1], int(match[2]), path, None)


def _file_name_parts(name: str, split: str, number: int, shards: int) -> dict[str, str]:
    index, of = f"{number:05d}", f"{shards:05d}"
    return {
        "DATASET": name,
        "SPLIT": split,
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": index,
        "NUM_SHARDS": of,
        "SHARD_X_OF_Y": f"{index}-of-{of}",
    }


def _leaves(node: Any, name: str, depth: int) -> Iterator[tuple[str, TfdsFeature]]:
    """The leaves below a node of features.json, by name.

    Raises:
        DataError: This is not a feature; the message lacks the file's name.
    """
    if not isinstance(node, dict):
        raise DataError(f"{name or 'the whole'}: {node!r:.80} is no feature")
    if "featuresDict" in node:
        at = f"{name or 'the whole'}, featuresDict"
        features = _object(_object(node["featuresDict"], at).get("features", {}), f"{at}.features")
        for key, child in sorted(features.items()):
            yield from _leaves(child, f"{name}/{key}" if name else key, depth)
    elif "sequence" in node:
        yield from _leaves(_object(node["sequence"], f"{name}, sequence").get("feature"), name, depth + 1)
    elif "text" in node:
        yield name, TfdsFeature("text", (), "string", "", depth)
    elif kind := next((kind for kind in ("image", "tensor") if kind in node), None):
        about = _object(node[kind], f"{name}, {kind}")
        dtype, encoding = ("uint8", about.get("encodingFormat")) if kind == "image" else ("", about.get("encoding"))
        default = "" if kind == "image" else "none"
        yield (
            name,
            TfdsFeature(kind, _shape(about, name), str(about.get("dtype", dtype)), str(encoding or default), depth),
        )
    else:
        kind = str(node.get("pythonClassName", "unknown")).rsplit(".", 1)[-1]
        yield name, TfdsFeature("other", (), kind, "", depth)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name or 'the whole'}: {value!r:.80} is no JSON object")
    return value


def _shape(node: Mapping[str, Any], name: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in _object(node.get("shape", {}), f"{name}, shape").get("dimensions", []))
    except (TypeError, ValueError):
        raise DataError(f"{name}: shape.dimensions: {node['shape']['dimensions']!r} are no numbers") from None


def count_steps(fetch: tfrecord.Fetch, found: Mapping[str, tfrecord.Values], steps: Mapping[str, TfdsFeature]) -> int:
    """Number of steps of an episode, counted on the feature that is cheapest to read.

    Raises:
        DataError: No feature has a known size.
    """
    counted = [k for k, f in steps.items() if f.kind == "tensor" and f.encoding == "none" and f.size > 0]
    for key in sorted(counted, key=lambda k: (steps[k].size, steps[k].dtype != "bool", k)):
        if values := found.get(f"steps/{key}"):
            return tfrecord.count(fetch, values) // steps[key].size
    raise DataError("has no steps")


def read_tensor(data: bytes, found: Mapping[str, tfrecord.Values], key: str, feature: TfdsFeature) -> np.ndarray:
    """A numeric feature of all steps, (T, *shape); floats are float32, integers and booleans int64 or as encoded.

    Raises:
        DataError: It is missing in this episode or does not have the declared shape.
    """
    fetch = _fetch(data)
    values = _values(found, key)
    if feature.encoding in ("bytes", "zlib"):
        raw = tfrecord.bytes_list(fetch, values)
        try:
            plain = [zlib.decompress(r) for r in raw] if feature.encoding == "zlib" else raw
            flat = np.frombuffer(b"".join(plain), np.dtype(feature.dtype).newbyteorder("<"))
        except (TypeError, ValueError, zlib.error) as e:
            raise DataError(f"steps/{key} cannot be unpacked as {feature} ({e})") from e
    else:
        flat = tfrecord.numbers(fetch, values)
    if flat.dtype == np.float64:
        flat = flat.astype(np.float32)
    try:
        return flat.reshape(-1, *feature.shape)
    except ValueError:
        raise DataError(f"steps/{key} holds {len(flat)} numbers, not a multiple of {feature}") from None


def read_bytes(data: bytes, found: Mapping[str, tfrecord.Values], key: str) -> list[bytes]:
    """An encoded feature of all steps.

    Raises:
        DataError: It is missing in this episode.
    """
    return tfrecord.bytes_list(_fetch(data), _values(found, key))


def _values(found: Mapping[str, tfrecord.Values], key: str) -> tfrecord.Values:
    try:
        return found[f"steps/{key}"]
    except KeyError:
        raise DataError(f"has no steps/{key}") from None


def _fetch(data: bytes) -> tfrecord.Fetch:
    return lambda start, stop: data[start:stop]


def read_features(data: bytes) -> dict[str, tfrecord.Values]:
    """Positions of an episode's features in its record."""
    return tfrecord.features(_fetch(data), 0, len(data))


def read_texts(
    fetch: tfrecord.Fetch, found: Mapping[str, tfrecord.Values], key: str, feature: TfdsFeature, first: bool = False
) -> list[str]:
    """The texts of a feature by its full name, stripped: one per step, or one for the episode; [] if it is missing.

    Characters may be stored as numbers, padded with zeros. With `first` only the first one is read, if it is a string.
    """
    values = found.get(key)
    if values is None:
        return []
    if values.kind == "int64":
        codes = tfrecord.numbers(fetch, values).astype(np.uint8)
        width = feature.shape[-1] if feature.shape and feature.shape[-1] > 0 else len(codes)
        raw = [bytes(row).split(b"\0")[0] for row in codes[: len(codes) // width * width].reshape(-1, width)]
    elif first:
        raw = [text for text in [tfrecord.first_bytes(fetch, values)] if text is not None]
    else:
        raw = tfrecord.bytes_list(fetch, values)
    return [text.decode("utf-8", "replace").strip() for text in raw]


def read_metadata(
    fetch: tfrecord.Fetch, found: Mapping[str, tfrecord.Values], leaves: Mapping[str, TfdsFeature]
) -> dict[str, Any]:
    """The scalars and texts outside the steps (`episode_metadata/…`), as JSON values."""
    meta: dict[str, Any] = {}
    for key, feature in leaves.items():
        values = found.get(key)
        if values is None or key.startswith("steps/") or feature.depth or feature.size != 1:
            continue
        if feature.kind == "text":
            text = tfrecord.first_bytes(fetch, values)
            meta[key.removeprefix("episode_metadata/")] = (text or b"").decode("utf-8", "replace")
        elif feature.kind == "tensor" and values.kind in ("float", "int64"):
            number = tfrecord.numbers(fetch, values)
            if len(number):
                value = number[0].item()
                meta[key.removeprefix("episode_metadata/")] = bool(value) if feature.dtype == "bool" else value
    return meta
