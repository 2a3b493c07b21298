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
        found = _strings(group)
        for key in language_keys(found):
            texts = _texts(found[key])
            if any(texts):
                return texts
    return []


def like_language(groups: Sequence[h5py.Group]) -> list[str]:
    """Names of attributes and string datasets that are not usual ones and might be instructions all the same."""
    names = {name: f"{group.name.rstrip('/')}/{name}" for group in groups for name in _strings(group)}
    return [full for name, full in names.items() if name.lower() not in LANGUAGE and looks_like_language(name)]


def _strings(group: h5py.Group) -> dict[str, Any]:
    """The group's texts by name: of attributes, and of datasets right below it."""
    datasets = {k: d for k in group if isinstance(d := group.get(k), h5py.Dataset) and d.dtype.kind in "SO"}
    attributes = {k: v for k, v in group.attrs.items() if np.asarray(v).dtype.kind in "SUO"}
    return {**datasets, **attributes}


def _texts(value: Any) -> list[str]:
    values = value[()] if isinstance(value, h5py.Dataset) else value
    return [hdf5.text(v).strip() for v in np.asarray(values).ravel()]
