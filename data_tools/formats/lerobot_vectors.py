"""Selecting the columns of a LeRobotDataset that, concatenated, are its action or its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.formats.checked import object_at, read_object, shown, whole
from data_tools.formats.lerobot_meta import LeRobotFeature
from stamo_dist.errors import DataError
from stamo_dist.recipe.layers import did_you_mean

#: Usual feature names; the first that exists is taken.
DEFAULTS = {"action": ("action", "actions"), "state": ("observation.state", "state", "observation.states")}

MODALITY = "modality.json"


@dataclass(frozen=True)
class FeatureSlice:
    """A feature's numbers from `start` up to `end`."""

    feature: LeRobotFeature
    start: int
    end: int

    @property
    def names(self) -> tuple[str, ...]:
        names = self.feature.names
        return names[self.start : self.end] if len(names) == self.feature.size else ()


def choose(
    root: Path, option: str, asked: Sequence[str], features: Mapping[str, LeRobotFeature], notes: list[str]
) -> list[FeatureSlice]:
    """The slices for `option` ("action" or "state"), in order; [] if the dataset has none, or `asked` is "none".

    Names are features, or slices of meta/modality.json. A feature found without being named is reported in `notes`.

    Raises:
        DataError: A name is unknown, or none is given and several features are candidates.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    if names == ["none"]:
        return []
    if names:
        slices = _modality(root, option, features)
        info = root / "meta" / "info.json"
        if unknown := [name for name in names if name not in features and name not in slices]:
            known = [*features, *slices]
            hint = did_you_mean(unknown[0], known) or "choose among these, or none."
            raise DataError(
                f"{option}: no feature {', '.join(unknown)}; {hint} There is: {', '.join(known)} "
                f"({info}, and slices of {MODALITY})"
            )
        return [slices[n] if n in slices else FeatureSlice(features[n], 0, features[n].size) for n in names]
    if found := next((name for name in DEFAULTS[option] if name in features), None):
        if found != DEFAULTS[option][0]:
            notes.append(f"{option}: taken from the feature {found}")
        return [FeatureSlice(features[found], 0, features[found].size)]
    if like := [name for name in features if option in name.lower()]:
        raise DataError(
            f"{root / 'meta' / 'info.json'}: {option}: no feature {' or '.join(DEFAULTS[option])}; give those "
            f"meant, in order, as --set {option}={','.join(like)}, or --set {option}=none"
        )
    notes.append(f"{option}: none of the features is one ({', '.join(features)}); say which with --set {option}=NAME")
    return []


def matrix(rows: pa.Table, parts: Sequence[FeatureSlice]) -> np.ndarray:
    """The slices concatenated, (T, D).

    Raises:
        DataError: A row's length differs from info.json.
    """
    columns = [_numbers(rows[p.feature.name], p.feature)[:, p.start : p.end] for p in parts]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0), np.float32)


def _modality(root: Path, option: str, features: Mapping[str, LeRobotFeature]) -> dict[str, FeatureSlice]:
    """GR00T's slices of the action or the state, by name."""
    path = root / "meta" / MODALITY
    section = object_at(read_object(path), option, str(path)) if path.is_file() else {}
    parts: dict[str, FeatureSlice] = {}
    for name, about in section.items():
        where = f"{path}, {option}.{name}"
        if not isinstance(about, dict):
            raise DataError(f"{where}: must be an object with start and end")
        key = about.get("original_key") or DEFAULTS.get(option, ("",))[0]
        start, end = (whole(about.get(side), f"{where}.{side}") for side in ("start", "end"))
        if not isinstance(key, str) or key not in features:
            raise DataError(f"{where}.original_key: {shown(key)} is no feature of info.json")
        if not 0 <= start < end <= features[key].size:
            raise DataError(
                f"{where}: there are no numbers {start} to {end} in {features[key].where}, "
                f"whose shape has {features[key].size}"
            )
        parts[name] = FeatureSlice(features[key], start, end)
    return parts


def _numbers(column: pa.ChunkedArray, feature: LeRobotFeature) -> np.ndarray:
    """A column of numbers, of lists of `size` numbers, or of records of both (field after field), as (T, size)."""
    values, name, size = column.combine_chunks(), feature.name, feature.size
    if pa.types.is_struct(values.type):
        fields = [_field(part, f"{name}.{path}") for path, part in _fields(values)]
        joined = np.concatenate(fields, axis=1) if fields else np.zeros((len(column), 0), np.float32)
        if joined.shape[1] != size:
            each = ", ".join(f"{path} {part.shape[1]}" for (path, _), part in zip(_fields(values), fields, strict=True))
            raise DataError(f"{name} has {joined.shape[1]} numbers a frame ({each}); info.json says {size}")
        return joined
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        nested = pa.types.is_nested(values.type.value_type)
        if not nested and (lengths != size).any():
            t = int(np.argmax(lengths != size))
            raise DataError(f"{name} has {lengths[t]} numbers at frame {t}; info.json says {size}")
    flat = _flat(values, name)
    if flat.size != len(column) * size:
        raise DataError(f"{name} has {flat.size} numbers in {len(column)} frames; info.json says {size} each")
    return flat.reshape(len(column), size)


def _fields(record: pa.StructArray) -> list[tuple[str, pa.Array]]:
    """A record's fields by their dotted paths, records within it resolved; in the order of the file."""
    found = []
    for about, part in zip(record.type, record.flatten(), strict=True):
        inner = _fields(part) if pa.types.is_struct(part.type) else [("", part)]
        found += [(f"{about.name}.{path}".rstrip("."), leaf) for path, leaf in inner]
    return found


def _field(values: pa.Array, name: str) -> np.ndarray:
    """A field of a record, (T, D); every frame must have the same number of values."""
    if pa.types.is_nested(values.type):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            t = int(np.argmax(lengths != lengths[0]))
            raise DataError(f"{name} has {lengths[t]} numbers at frame {t}, but {lengths[0]} at frame 0")
    flat = _flat(values, name)
    return flat.reshape(len(values), -1) if len(values) else np.zeros((0, 0), np.float32)


def _flat(values: pa.Array, name: str) -> np.ndarray:
    """All numbers of a column, one after the other."""
    while pa.types.is_nested(values.type):
        if pa.types.is_struct(values.type):
            raise DataError(f"{name}: lists of records of {', '.join(f.name for f in values.type)}, not numbers")
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if flat.dtype.kind not in "fiub":
        raise DataError(f"{name}: {values.type}, not numbers")
    return flat
