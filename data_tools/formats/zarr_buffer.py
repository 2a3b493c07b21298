"""Zarr stores with a ReplayBuffer: finding, opening and checking them, and reading rows."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.source import RUN
from data_tools.formats.zarr_metadata import DAMAGE
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

ENDS = "meta/episode_ends"
#: Codecs that execute code from the file.
UNSAFE = ("pickle",)
#: Float images are taken to range from 0 to 1 if they do not exceed this.
ONE = 1.0 + 1e-3
#: Arrays up to this many bytes are read at once and cached: a read costs a millisecond, however small.
SMALL = 64 << 20
#: Buffers that one process keeps open.
_OPEN = 4


def is_buffer(path: Path) -> bool:
    """Whether a path is a zarr group: a folder or a zip."""
    return (path.is_file() and path.suffix == ".zip") or any((path / n).is_file() for n in (".zgroup", "zarr.json"))


def find_buffers(src: Path) -> list[Path]:
    """`src` itself, or the .zarr folders and .zarr.zip files below it.

    Raises:
        DataError: There is none.
    """
    if is_buffer(src):
        return [src]
    if not src.is_dir():
        raise DataError(f"{src}: no such .zarr folder or .zarr.zip")
    found = sorted(p for p in (*src.rglob("*.zarr"), *src.rglob("*.zarr.zip")) if is_buffer(p))
    if not found:
        raise DataError(f"{src}: no zarr group (.zgroup or zarr.json), and no .zarr folder or .zarr.zip in this folder")
    return found


@contextmanager
def open_buffer(path: Path) -> Iterator[Any]:
    """The zarr group of a ReplayBuffer, open for reading.

    Raises:
        DataError: zarr is not installed, or this is not a ReplayBuffer, or damaged where it was read.
    """
    group = _open(path)
    try:
        yield group
    except DAMAGE as e:
        raise _damaged(path, e) from e
    finally:
        if path.is_file():
            group.store.close()


def _open(path: Path) -> Any:
    try:
        import zarr
    except ImportError as e:
        raise DataError(f"reading .zarr needs the package zarr; {how_to_install('zarr')}") from e
    _register_codecs()
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise DataError(f"{path}: cannot be read as a zarr ReplayBuffer (not a whole zip file)")
        store = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else str(path)
        return _checked(path, zarr.open_group(store, mode="r"))
    except DAMAGE as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, error: Exception) -> DataError:
    hint = f"; {how_to_install('zarr')}" if "codec not available" in str(error) else ""
    return DataError(f"{path}: cannot be read as a zarr ReplayBuffer ({type(error).__name__}: {error}){hint}")


@cache
def _register_codecs() -> None:
    try:
        from imagecodecs.numcodecs import register_codecs  # JPEG XL, which UMI's pictures are stored in

        register_codecs(verbose=False)
    except ImportError:
        pass  # the error of a missing codec names it


@contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Turns exceptions into a DataError that names the damaged array."""
    try:
        yield
    except DAMAGE as e:
        raise DataError(f"{path}: {key} cannot be read ({type(e).__name__}: {e})") from e


def _checked(path: Path, group: Any) -> Any:
    if "data" not in group or ENDS not in group:
        raise DataError(
            f"{path}: no group data (with .zgroup or zarr.json) or no array {ENDS} (with .zarray or zarr.json): not a "
            f"ReplayBuffer; it has {', '.join(group) or 'nothing'}"
        )
    if not hasattr(group["data"], "array_keys") or not hasattr(group[ENDS], "dtype"):
        raise DataError(f"{path}: data is no group, or {ENDS} no array: not a ReplayBuffer")
    return group


def check_codecs(path: Path, array: Any) -> None:
    """Raises:
    DataError: Reading this array would execute code from the file.
    """
    compressors = getattr(array, "compressors", None)
    codecs = [*(array.filters or ()), *([getattr(array, "compressor", None)] if compressors is None else compressors)]
    if array.dtype.kind == "O" or any(getattr(codec, "codec_id", "") in UNSAFE for codec in codecs):
        raise DataError(f"{path}: {array.name} holds pickled objects, which are not read")


def read_ends(path: Path, buffer: Any) -> np.ndarray:
    """int64 (E,), increasing."""
    check_codecs(path, buffer[ENDS])
    with reading(path, ENDS):
        ends = np.asarray(buffer[ENDS][:])
    if ends.ndim != 1 or not len(ends) or ends.dtype.kind not in "iu" or (np.diff(ends, prepend=0) <= 0).any():
        raise DataError(f"{path}: {ENDS} must be increasing whole numbers, not {ends.dtype} {ends.shape}")
    return ends.astype(np.int64)


def is_picture(array: Any) -> bool:
    return array.ndim == 4 and array.shape[3] == 3 and (array.dtype == np.uint8 or array.dtype.kind == "f")


def pictures(data: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(data) if is_picture(data[key])]


def unit_of(images: Any) -> float:
    """Factor from stored pixel values to 0…255; floats range from 0 to 1 if the first frames do not exceed that."""
    floats = images.dtype.kind == "f"
    return 255.0 if floats and float(np.max(images[:RUN], initial=0)) <= ONE else 1.0


#: An empty set of frames.
_NONE = np.empty(0)


class OpenBuffer:
    """A buffer that stays open from one episode to the next.

    Reopening would read the metadata again; chunks that two episodes share are decompressed only once.
    """

    def __init__(self, path: Path):
        self.path, self._data = path, _open(path)["data"]
        self._arrays: dict[str, Any] = {}
        self._units: dict[str, float] = {}
        self._runs: dict[str, tuple[int, np.ndarray]] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._arrays:
            array = self._arrays[key] = self._data[key]
            if array.ndim <= 2 and array.nbytes <= SMALL:
                with suppress(*DAMAGE):  # so that episodes outside the damaged rows can still be read
                    self._arrays[key] = array[:]
        return self._arrays[key]

    def frames(self, key: str, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8 of increasing rows."""
        images = self[key]
        if key not in self._units:
            self._units[key] = unit_of(images)
        run = images.chunks[0] * -(-RUN // images.chunks[0])
        start, block = self._runs.get(key, (0, _NONE))
        for row in rows:
            if not start <= row < start + len(block):
                start = row - row % run
                block = images[start : start + run]
                self._runs[key] = (start, block)
            image = block[row - start]
            if image.dtype != np.uint8:
                image = np.clip(np.rint(image * self._units[key]), 0, 255).astype(np.uint8)
            yield image


@lru_cache(_OPEN)
def kept_open(path: Path, reader: str) -> OpenBuffer:
    """The open buffer, cached per reader and process."""
    return OpenBuffer(path)
