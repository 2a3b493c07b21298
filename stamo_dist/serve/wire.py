"""JSON as json_numpy writes it and msgpack as openpi's and vla-eval's clients write it, read without running anything.

Arrays become numpy arrays of booleans, integers or floats; what claims to be an array and is none becomes `Broken`, so
that the check of its field says what is wrong with it. No pickle, no object arrays, no extension types.
"""

from __future__ import annotations

import io
import json
import math
import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import json_numpy
import msgpack
import numpy as np
from PIL import Image

from stamo_dist.serve.limits import DEFAULT, Limits

_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_MOST_AXES = 8
_MOST_ITEMS = 1 << 16  # of one list or map of msgpack, which reserves memory before it reads them


class BadRequestError(Exception):
    """An invalid request: the field, the problem, and the HTTP status that says so."""

    def __init__(self, field: str, problem: str, status: int = 400):
        self.field, self.problem, self.status = printable(field), printable(problem), status
        super().__init__(f"{self.field}: {self.problem}")


@dataclass(frozen=True)
class Broken:
    """Stands where an array was to be."""

    problem: str


def printable(text: str, most: int = 300) -> str:
    """Text that any encoder can write, shortened."""
    text = text if len(text) <= most else f"{text[:most]}…"
    return text.encode("utf-8", "backslashreplace").decode()


def said(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Broken):
        return value.problem
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return "null" if value is None else type(value).__name__


class Reader:
    """Reads one request; its arrays share one allowance of memory."""

    def __init__(self, limits: Limits = DEFAULT):
        self._limits, self._left = limits, limits.decoded

    def json(self, text: str | bytes, field: str) -> dict[str, Any]:
        """Raises: BadRequestError: It is not JSON, or no map."""
        try:
            found = json.loads(text, object_hook=self._from_json)
        except RecursionError:
            raise BadRequestError(field, "is nested too deeply") from None
        except (ValueError, TypeError) as error:
            raise BadRequestError(field, f"is not JSON as json_numpy writes it ({error})") from None
        if not isinstance(found, dict):
            raise BadRequestError(field, f"is {said(found)}, not a map")
        return found

    def msgpack(self, data: bytes, field: str) -> dict[Any, Any]:
        """Raises: BadRequestError: It is not msgpack, or no map."""
        try:
            found = msgpack.unpackb(
                data,
                object_hook=self._from_msgpack,
                ext_hook=lambda code, data: Broken("an extension type of msgpack, which is not read"),
                max_array_len=_MOST_ITEMS,
                max_map_len=_MOST_ITEMS,
            )
        except RecursionError:
            raise BadRequestError(field, "is nested too deeply") from None
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            problem = "is nested too deeply" if isinstance(error, msgpack.StackError) else f"is not msgpack ({error})"
            raise BadRequestError(field, problem) from None
        if not isinstance(found, dict):
            raise BadRequestError(field, f"is {said(found)}, not a map")
        return found

    def _from_json(self, found: dict[str, Any]) -> Any:
        if "__numpy__" not in found:
            return found
        try:
            data = b64decode(found["__numpy__"], validate=True)
        except (ValueError, TypeError):
            return Broken("an array whose bytes are not base64")
        return self._array(data, found.get("dtype"), found.get("shape"))

    def _from_msgpack(self, found: dict[Any, Any]) -> Any:
        if "__image__" in found:
            if found.get("format") != "raw":
                return self._image(found.get("data"), found.get("format"))
            return self._array(found.get("data"), found.get("dtype"), found.get("shape"))
        if "__ndarray__" in found:
            return self._array(found.get("data"), found.get("dtype"), found.get("shape"))
        if b"__ndarray__" in found:
            return self._array(found.get(b"data"), found.get(b"dtype"), found.get(b"shape"))
        if b"__npgeneric__" in found:
            return found.get(b"data")
        return found

    def _array(self, data: Any, dtype: Any, shape: Any) -> Any:
        """The array, or scalar, of these bytes."""
        if not isinstance(data, bytes):
            return Broken(f"an array whose bytes are {said(data)}")
        if not isinstance(dtype, str) or not _NUMBERS.fullmatch(dtype):
            return Broken(f"an array of dtype {printable(str(dtype), 40)}, not of booleans, integers or floats")
        if not _is_shape(shape):
            return Broken(f"an array whose shape is not a list of at most {_MOST_AXES} sizes")
        kind = np.dtype(dtype)
        if math.prod(shape) * kind.itemsize != len(data):
            return Broken(f"an array of {len(data)} bytes, which are not {kind} {tuple(shape)}")
        if not self._allows(len(data)):
            return Broken(self._too_much())
        return np.frombuffer(data, kind).reshape(shape)[()]

    def _image(self, data: Any, form: Any) -> Any:
        """uint8 (H, W, 3) of a PNG or JPEG."""
        if form not in ("png", "jpeg") or not isinstance(data, bytes):
            return Broken("an image that is neither PNG nor JPEG nor raw")
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
                if max(picture.size) > self._limits.side:
                    return Broken(f"an image of {picture.height} × {picture.width}; {self._limits.side} a side at most")
                if not self._allows(3 * picture.width * picture.height):
                    return Broken(self._too_much())
                return np.array(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            return Broken("an image that cannot be decoded")

    def _allows(self, size: int) -> bool:
        self._left -= size
        return self._left >= 0

    def _too_much(self) -> str:
        return f"one array too many: those of a request take {self._limits.decoded >> 20} MiB at most"


def _is_shape(shape: Any) -> bool:
    # Booleans are integers to Python; huge ones would make math.prod slow.
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < 1 << 32 for size in shape)
    )


def to_json(content: Any) -> str:
    """JSON as json_numpy writes it."""
    text: str = json_numpy.dumps(content)
    return text


def to_openpi(content: Mapping[str, Any]) -> bytes:
    """Msgpack as openpi's msgpack_numpy writes it."""
    return _packed(content, lambda a: {b"__ndarray__": True, b"data": a.tobytes(), b"dtype": a.dtype.str,
                                       b"shape": a.shape})  # fmt: skip


def to_vla_eval(content: Mapping[str, Any]) -> bytes:
    """Msgpack as vla-eval's numpy_codec writes it."""
    return _packed(content, lambda a: {"__ndarray__": True, "data": a.tobytes(), "dtype": a.dtype.str,
                                       "shape": list(a.shape)})  # fmt: skip


def _packed(content: Mapping[str, Any], array: Any) -> bytes:
    packed: bytes = msgpack.packb(content, default=lambda value: array(np.asarray(value)))
    return packed


def numbers(values: Any, size: int, field: str) -> np.ndarray:
    """A vector → (size,) float64.

    Raises:
        BadRequestError: It is none, of another size, or some of its numbers are not finite.
    """
    if not isinstance(values, np.ndarray | list | tuple):
        raise BadRequestError(field, f"is {said(values)}; {size} numbers are wanted")
    if not isinstance(values, np.ndarray):
        if len(values) != size:
            raise BadRequestError(field, f"has shape ({len(values)},); {size} finite numbers are wanted")
        if any(not isinstance(value, int | float | np.number) or isinstance(value, bool) for value in values):
            raise BadRequestError(field, "is not an array of numbers")
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadRequestError(field, "is not an array of numbers") from None
    if found.shape != (size,):
        raise BadRequestError(field, f"has shape {found.shape}; {size} finite numbers are wanted")
    if len(wrong := np.flatnonzero(~np.isfinite(found))):
        raise BadRequestError(f"{field}[{wrong[0]}]", f"is {said(float(found[wrong[0]]))}; give finite numbers")
    return found
