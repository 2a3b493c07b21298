"""Instructions in HDF5: attributes and string datasets with a usual name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from data_tools.formats import hdf5
from data_tools.formats.remarks import LANGUAGE, language_keys, looks_like_language


def find_texts(groups: Sequence[h5py.Group]) -> list[str]:
    """The texts under the first usual name that has one, in the groups in order: one, or one a step; [] without any."""
    for group in groups:
        for key in language_keys([*group, *group.attrs]):
            value = _string(group, key)
            if value is not None and any(texts := _texts(value)):
                return texts
    return []


def like_language(groups: Sequence[h5py.Group]) -> list[str]:
    """Names of attributes and string datasets that are not usual ones and might be instructions all the same."""
    named = {
        name: f"{group.name.rstrip('/')}/{name}"
        for group in groups
        for name in [*group, *group.attrs]
        if name.lower() not in LANGUAGE and looks_like_language(name) and _string(group, name) is not None
    }
    return list(named.values())


def _string(group: h5py.Group, name: str) -> Any:
    """A text, or several, of the group: an attribute, or a dataset right below it; None if it is neither."""
    if name in group.attrs and np.asarray(group.attrs[name]).dtype.kind in "SUO":
        return group.attrs[name]
    dataset = group.get(name)
    return dataset if isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "SO" else None


def _texts(value: Any) -> list[str]:
    values = value[()] if isinstance(value, h5py.Dataset) else value
    return [hdf5.text(v).strip() for v in np.asarray(values).ravel()]
