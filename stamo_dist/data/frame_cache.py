"""Cached outputs of frozen models for every frame, beside the shards: a VAE's latents, a StaMo tokenizer's states.

SOURCE/SPLIT/CAMERA/KIND-<first 16 characters of the model's fingerprint>/shard.NNNNN.npy holds one array per sample of
shard.NNNNN; bfloat16 is stored as its bit pattern, uint16, as numpy has no such type. shard.NNNNN.json, written after
it, identifies its source; without it the array is ignored. manifest.json describes the whole folder; it is written
by every process that finds arrays for all shards of the camera.

Loader workers import this module, so it must stay free of torch.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.shard_table import Shards, ShardTable
from stamo_dist.data.shards import ShardSpec, mappings_allowed
from stamo_dist.errors import DataError

Kind = Literal["latents", "states"]
Precision = Literal["float16", "bfloat16", "float32"]
MANIFEST = "manifest.json"
_STORED: dict[Precision, type] = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
_EACH = 64  # folders with at most this many shards have every shard checked
_NDIM = {"latents": 4, "states": 3}  # number of axes: (n, C, h, w) and (n, tokens, dim)
_FIELD = {"latents": "data.latents", "states": "policy.targets"}


def cache_path(shard: ShardSpec, kind: Kind, fingerprint: str) -> Path:
    """The file with the rows that the model of `fingerprint` computed from `shard`."""
    path = Path(shard.path)
    return path.parent / f"{kind}-{fingerprint[:16]}" / f"{path.stem}.npy"


def write_cache(
    shard: ShardSpec, kind: Kind, fingerprint: str, rows: NDArray[Any], precision: Precision, *, computed: str = "fp32"
) -> Path:
    """Write the rows of one shard atomically.

    Args:
        shard: The shard from which they were computed.
        kind: What they are.
        fingerprint: Of the model and the processing of its output.
        rows: latents (n, C, h, w) or states (n, tokens, dim); bfloat16 as 2-byte integers holding the bit patterns.
        precision: Number format of the bytes.
        computed: Arithmetic of the model, for the record.

    Raises:
        DataError: Not one row per sample of that precision, or the folder cannot be written.
    """
    size = np.dtype(_STORED[precision]).itemsize
    if rows.dtype.itemsize != size or rows.ndim != _NDIM[kind] or len(rows) != shard.samples:
        raise DataError(f"{shard.path}: {shard.samples} samples do not fit {kind} {rows.shape} {rows.dtype}")
    path = cache_path(shard, kind, fingerprint)
    about = {"shape": list(rows.shape[1:]), "precision": precision, "computed": computed}
    meta = {**_expected(shard, fingerprint), **about}
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        with scratch.open("wb") as file:
            np.save(file, np.ascontiguousarray(rows).view(_STORED[precision]))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        scratch.write_text(json.dumps(meta))
        scratch.replace(path.with_suffix(".json"))
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror or e}") from e
    return path


def write_manifests(shards: Sequence[ShardSpec], kind: Kind, fingerprint: str, about: Mapping[str, Any]) -> list[Path]:
    """Write the manifest of every folder whose shards all have rows, and remove files left by killed processes."""
    folders: dict[Path, list[ShardSpec]] = {}
    for shard in shards:
        folders.setdefault(cache_path(shard, kind, fingerprint).parent, []).append(shard)
    written = []
    for folder, of_folder in folders.items():
        metas = [_read_meta(shard, kind, fingerprint) for shard in of_folder]
        if not all(isinstance(meta, dict) for meta in metas):
            continue
        for scratch in folder.glob("*.tmp"):
            scratch.unlink(missing_ok=True)
        first = metas[0]
        assert isinstance(first, dict)
        content = {
            "kind": kind,
            "fingerprint": fingerprint,
            "shape": list(first["shape"]),
            "precision": first["precision"],
            "shards": len(of_folder),
            "samples": sum(shard.samples for shard in of_folder),
            "computed": sorted({_computed(cache_path(shard, kind, fingerprint)) for shard in of_folder}),
            **about,
        }
        scratch = folder / f".{MANIFEST}.{os.getpid()}"
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(folder / MANIFEST)
        written.append(folder / MANIFEST)
    return written


def _computed(path: Path) -> str:
    """The arithmetic in which a shard's rows were computed."""
    return str(json.loads(path.with_suffix(".json").read_text()).get("computed", "unknown"))


def has_cache(shard: ShardSpec, kind: Kind, fingerprint: str) -> bool:
    """Whether the cache of `shard` is complete and was computed from its current content."""
    return isinstance(_read_meta(shard, kind, fingerprint), dict)


def _expected(shard: ShardSpec, fingerprint: str) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "shard": shard.digest, "samples": shard.samples}


def _read_meta(shard: ShardSpec, kind: Kind, fingerprint: str) -> dict[str, Any] | str:
    """The cache's description, or what is wrong with it."""
    path = cache_path(shard, kind, fingerprint)
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        for key, value in _expected(shard, fingerprint).items():
            if meta[key] != value:
                return "stale: the shard has changed since"
        size = np.dtype(_STORED[meta["precision"]]).itemsize
        if path.stat().st_size < size * meta["samples"] * int(np.prod(meta["shape"])):
            return "cut short"
        return {"shape": tuple(meta["shape"]), "precision": meta["precision"]}
    except (OSError, ValueError, KeyError, TypeError):
        others = sorted(p.name for p in path.parent.parent.glob(f"{kind}-*") if p != path.parent)
        return f"missing (there is {', '.join(others)}, of another model)" if others else "missing"


@dataclass(frozen=True)
class CacheSpec:
    """A complete cache: one file per shard, all of one shape and precision."""

    kind: Kind
    fingerprint: str
    shape: tuple[int, ...]
    precision: Precision

    @property
    def dtype(self) -> str:
        """The numpy dtype string of one stored number."""
        return np.dtype(_STORED[self.precision]).str


def find_cache(shards: Shards, kind: Kind, fingerprint: str) -> CacheSpec:
    """The caches of all `shards`.

    In a folder with many shards, only manifest.json, the first and the last are checked; the others when they are
    mapped.

    Raises:
        DataError: Any of them is missing, stale, cut short or of another shape; names the command that creates them.
    """
    metas = [found for table in shards.tables for found in _metas(table, kind, fingerprint)]
    good = [meta for _, meta in metas if isinstance(meta, dict)]
    bad = [f"{cache_path(shard, kind, fingerprint)}: {meta}" for shard, meta in metas if isinstance(meta, str)]
    bad += [
        f"{cache_path(shard, kind, fingerprint)}: {meta['shape']} {meta['precision']}, others have {good[0]['shape']}"
        for shard, meta in metas
        if isinstance(meta, dict) and meta != good[0]
    ]
    if bad:
        lines = [f"  - {line}" for line in bad[:5]] + ([f"  … and {len(bad) - 5} more"] if len(bad) > 5 else [])
        raise DataError(
            "\n".join([f"{kind} are not cached for {len(bad)} of {len(shards)} shards:", *lines])
            + f"\nrun `stamo encode RECIPE`, or set {_FIELD[kind]}: online"
        )
    return CacheSpec(kind, fingerprint, good[0]["shape"], good[0]["precision"])


def _metas(table: ShardTable, kind: Kind, fingerprint: str) -> list[tuple[ShardSpec, dict[str, Any] | str]]:
    """The shards of a folder that are checked, and their descriptions."""

    def look(shards: Sequence[ShardSpec]) -> list[tuple[ShardSpec, dict[str, Any] | str]]:
        return [(shard, _read_meta(shard, kind, fingerprint)) for shard in shards]

    if len(table) <= _EACH:
        return look(table)
    ends = look([table[0], table[len(table) - 1]])
    try:
        manifest = json.loads((cache_path(table[0], kind, fingerprint).parent / MANIFEST).read_text())
        whole = manifest["fingerprint"] == fingerprint and manifest["shards"] >= len(table)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    return ends if whole and all(isinstance(meta, dict) for _, meta in ends) else look(table)


class CacheFiles:
    """The cached rows of the shards by number, mapped; item `i` is (n, *shape), bfloat16 as bit patterns."""

    def __init__(self, spec: CacheSpec, shards: Sequence[ShardSpec]):
        self._spec, self._shards, self._limit = spec, shards, mappings_allowed()
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __getitem__(self, number: int) -> NDArray[Any]:
        array = self._open.get(number)
        if array is None:
            shard, spec = self._shards[number], self._spec
            path = cache_path(shard, spec.kind, spec.fingerprint)
            if isinstance(wrong := _read_meta(shard, spec.kind, spec.fingerprint), str):
                raise DataError(f"{path}: {wrong}; run `stamo encode RECIPE` again")
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False).view(self._spec.dtype)
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

    def forget(self, number: int) -> None:
        """Unmap the rows of a shard, if they are mapped."""
        self._open.pop(number, None)
