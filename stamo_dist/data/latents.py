"""The frozen VAE's latents, cached beside the shards.

SOURCE/SPLIT/CAMERA/latents-<first 16 characters of the VAE's fingerprint>/shard.NNNNN.npy holds one latent per sample
of shard.NNNNN, 2-byte floats (n, C, h, w); bfloat16 is stored as its bit pattern, uint16, as numpy has no such type.
shard.NNNNN.json, written after it, says what it was made of; without it the array does not count.

Loader workers import this module, so it must stay free of torch.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.shards import ShardSpec
from stamo_dist.errors import DataError

Precision = Literal["float16", "bfloat16"]


def latents_path(shard: ShardSpec, fingerprint: str) -> Path:
    """Where the latents of `shard` by the VAE of `fingerprint` are kept."""
    path = Path(shard.path)
    return path.parent / f"latents-{fingerprint[:16]}" / f"{path.stem}.npy"


def write_latents(shard: ShardSpec, fingerprint: str, latents: NDArray[Any], precision: Precision) -> Path:
    """Write the latents of one shard; a reader sees either all of them or none.

    Args:
        shard: The shard they were made of.
        fingerprint: Of the VAE and what was done to its output.
        latents: (n, C, h, w), float16, or 2-byte integers holding the bit patterns of bfloat16.
        precision: What the two bytes mean.

    Raises:
        DataError: Not one 2-byte latent per sample, or the folder cannot be written.
    """
    if latents.dtype.itemsize != 2 or latents.ndim != 4 or len(latents) != shard.samples:
        raise DataError(f"{shard.path}: {shard.samples} samples do not fit latents {latents.shape} {latents.dtype}")
    path = latents_path(shard, fingerprint)
    stored = np.ascontiguousarray(latents).view(np.float16 if precision == "float16" else np.uint16)
    meta = {**_expected(shard, fingerprint), "shape": list(latents.shape[1:]), "precision": precision}
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        with scratch.open("wb") as file:
            np.save(file, stored)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        scratch.write_text(json.dumps(meta))
        scratch.replace(path.with_suffix(".json"))
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror or e}") from e
    return path


def has_latents(shard: ShardSpec, fingerprint: str) -> bool:
    """Whether the cache of `shard` is whole and was made from the shard as it is now."""
    return isinstance(_read_meta(shard, fingerprint), dict)


def _expected(shard: ShardSpec, fingerprint: str) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "shard": shard.digest, "samples": shard.samples}


def _read_meta(shard: ShardSpec, fingerprint: str) -> dict[str, Any] | str:
    """The cache's description, or what is wrong with it."""
    path = latents_path(shard, fingerprint)
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        for key, value in _expected(shard, fingerprint).items():
            if meta[key] != value:
                return "stale"
        if path.stat().st_size < 2 * meta["samples"] * int(np.prod(meta["shape"])):
            return "cut short"
        return {"shape": tuple(meta["shape"]), "precision": meta["precision"]}
    except (OSError, ValueError, KeyError, TypeError):
        return "missing"


@dataclass(frozen=True)
class LatentSpec:
    """A whole cache: one file per shard, all of one shape and precision."""

    files: Sequence[str]
    shape: tuple[int, ...]
    precision: Precision


def find_latents(shards: Sequence[ShardSpec], fingerprint: str) -> LatentSpec:
    """The caches of all `shards`.

    Raises:
        DataError: Any of them is missing, stale, cut short or of another shape; names the command that makes them.
    """
    metas = [_read_meta(shard, fingerprint) for shard in shards]
    good = [meta for meta in metas if isinstance(meta, dict)]
    bad = [
        f"{latents_path(shard, fingerprint)}: {meta}"
        for shard, meta in zip(shards, metas, strict=True)
        if isinstance(meta, str)
    ]
    bad += [
        f"{latents_path(shard, fingerprint)}: {meta['shape']} {meta['precision']}, but others are {good[0]['shape']}"
        for shard, meta in zip(shards, metas, strict=True)
        if isinstance(meta, dict) and meta != good[0]
    ]
    if bad:
        lines = [f"  - {line}" for line in bad[:5]] + ([f"  … and {len(bad) - 5} more"] if len(bad) > 5 else [])
        raise DataError(
            "\n".join([f"latents are not cached for {len(bad)} of {len(shards)} shards:", *lines])
            + "\nrun `stamo encode RECIPE`, or set data.latents: online"
        )
    files = [str(latents_path(shard, fingerprint)) for shard in shards]
    return LatentSpec(files, good[0]["shape"], good[0]["precision"])


class LatentFiles:
    """The cached latents of the shards by number, mapped; item `i` is uint16 (n, C, h, w), bit patterns."""

    def __init__(self, spec: LatentSpec, limit: int = 256):
        self._spec, self._limit = spec, limit
        self._open: OrderedDict[int, NDArray[np.uint16]] = OrderedDict()

    def __getitem__(self, number: int) -> NDArray[np.uint16]:
        array = self._open.get(number)
        if array is None:
            path = self._spec.files[number]
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.uint16)
            except (OSError, ValueError) as e:
                raise DataError(f"{path}: not readable: {e}; run `stamo encode RECIPE` again") from None
            if array.shape[1:] != self._spec.shape:
                raise DataError(f"{path}: holds {array.shape[1:]}, not {self._spec.shape}; run `stamo encode` again")
            self._open[number] = array
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return array
