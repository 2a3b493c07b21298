"""Instructions in HDF5: attributes and string datasets with a usual name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from data_tools.formats import hdf5
from data_tools.formats.remarks import LANGUAGE, language_keys, looks_like_language
from stamo_dist.errors import DataError


def find_texts(groups: Sequence[h5py.Group], length: int | None = None) -> list[str]:
    """Texts under the first usual name that has one, searching the groups in order: one, or one per step; else [].

    Raises:
        DataError: They are not UTF-8, or their number is neither one nor `length`, if that is given.
    """
    for group in groups:
        keys = language_keys([*group, *group.attrs])
        if lost := [key for key in keys if key in group and hdf5.node(group, key) is None]:
            raise DataError(f"{group.name}: {lost[0]} is a link to what is not there")
        for key in keys:
            if (value := _string(group, key)) is None:
                continue
            try:
                texts = _texts(value)
            except DataError as e:
                raise DataError(f"{group.name}: {key}: {e}") from e
            if any(texts):
                if length is not None and len(texts) not in (1, length):
                    raise DataError(f"{group.name}: {key} has {len(texts)} texts for {length} steps")
                return texts
    return []


def like_language(groups: Sequence[h5py.Group]) -> list[str]:
    """Attributes and string datasets with unusual names that may nevertheless be instructions."""
    named = {
        name: f"{group.name.rstrip('/')}/{name}"
        for group in groups
        for name in [*group, *group.attrs]
        if name.lower() not in LANGUAGE and looks_like_language(name) and _string(group, name) is not None
    }
    return list(named.values())


def _string(group: h5py.Group, name: str) -> Any:
    """Text or texts in an attribute of the group or a dataset directly below it; None if it is neither."""
    value = group.attrs.get(name)
    if value is not None and not isinstance(value, h5py.Empty) and _is_string(value):
        return value
    dataset = hdf5.node(group, name) if name in group else None
    return dataset if hdf5.is_texts(dataset) else None


def _is_string(value: Any) -> bool:
    values = np.asarray(value)
    return values.dtype.kind in "SU" or (
        values.dtype.kind == "O" and all(isinstance(v, str | bytes) for v in values.ravel())
    )


def _texts(value: Any) -> list[str]:
    values = value[()] if isinstance(value, h5py.Dataset) else value
    return [hdf5.text(v).strip() for v in np.asarray(values).ravel()]
