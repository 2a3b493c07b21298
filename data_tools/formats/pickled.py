"""Reading plain values from a pickled .npy, such as CALVIN's annotations, without executing code from the file.

A pickle names the functions that are called to make its objects. Only the names that numpy writes for arrays are
allowed, and they are replaced by placeholders that record their arguments; any other name is refused before it is
imported. Containers, texts and numbers are handled by pickle. Arrays are built afterwards, from bytes of checked type
and size.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stamo_dist.errors import DataError

#: Kinds of dtypes that hold plain values, not object references.
_KINDS = "biufSU"
#: Maximum nesting depth of containers.
_DEPTH = 32


class _Placeholder:
    """Placeholder for a function that a pickle calls; records arguments and state."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Placeholder):
    __slots__ = ()


class _Dtype(_Placeholder):
    __slots__ = ()


class _Scalar(_Placeholder):
    __slots__ = ()


_KNOWN: dict[tuple[str, str], type[_Placeholder]] = {
    ("numpy", "ndarray"): _Placeholder,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not done")
        return _KNOWN[module, name]


def load_pickled(path: Path) -> Any:
    """The content of a .npy file with one pickled object: dicts, lists, tuples, texts, numbers; object arrays as lists.

    Raises:
        DataError: It cannot be read, or names a function that is not allowed.
    """
    try:
        with path.open("rb") as file:
            _skip_header(file)
            found = _plain(_Unpickler(file).load(), 0)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from e
    except Exception as e:  # a damaged pickle may raise anything
        raise DataError(f"{path}: its pickle is not read: {e or type(e).__name__}") from e
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def _skip_header(file: BinaryIO) -> None:
    """Raises:
    ValueError: Not a .npy file, or not an object array.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read(file)
    if dtype.kind != "O":
        raise ValueError(f"it holds {dtype}, no pickled objects")


def _plain(value: Any, depth: int) -> Any:
    """Build numpy's arrays and scalars from their placeholders; an object array becomes a list.

    Raises:
        ValueError: It nests too deeply, or an array's size, shape and type do not match.
    """
    if depth > _DEPTH:
        raise ValueError(f"it nests more than {_DEPTH} deep")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items() if isinstance(key, (str, int))}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, depth + 1) for item in value)
    if isinstance(value, _Array):
        _, shape, dtype, columns_first, content = value.state
        if isinstance(content, list):
            return [_plain(item, depth + 1) for item in content]
        return _numbers(dtype, content, tuple(shape), "F" if columns_first else "C")
    if isinstance(value, _Scalar):
        dtype, content = value.arguments
        return _numbers(dtype, content, (), "C").item()
    if isinstance(value, _Placeholder):
        raise ValueError("it holds something else than values")
    return value


def _numbers(noted: Any, content: Any, shape: tuple[int, ...], order: Any) -> np.ndarray:
    dtype = np.dtype(noted.arguments[0]) if isinstance(noted.arguments[0], str) else np.dtype(object)
    if dtype.kind not in _KINDS or not isinstance(content, bytes):
        raise ValueError(f"it holds an array of {dtype}")
    if isinstance(noted.state, tuple) and noted.state[1] in ("<", ">"):
        dtype = dtype.newbyteorder(noted.state[1])
    if dtype.itemsize * math.prod(shape) != len(content):
        raise ValueError(f"{len(content)} bytes are no {dtype} {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order=order)
