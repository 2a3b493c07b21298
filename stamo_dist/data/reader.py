"""Fills batches: mapped shards → decoded, augmented frames and action chunks in memory that processes share.

Loader workers run this module, so it must stay free of streaming, and of torch but for augmentation that resizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.column_file import ColumnFile
from stamo_dist.data.frame_cache import CacheFiles, CacheSpec
from stamo_dist.data.shard_table import Shards, ShardTable
from stamo_dist.data.shards import MappedShard, OpenShards
from stamo_dist.data.shared_buffers import BufferField, SharedBuffers
from stamo_dist.errors import DataError

Place = tuple[int, int]  # of a shard: view, number
_TRIES = 16  # frames to try in place of one that cannot be read


@dataclass(frozen=True)
class Window:
    """The context to read for frame t, besides the frame itself.

    `horizons`: per source, frames from t to the target frame, at most `horizon`. `chunks`: per source, actions in a
    chunk; 0 if its actions are not read.
    """

    horizon: int
    horizons: Sequence[int]  # (sources,)
    chunks: Sequence[int]  # (sources,)
    target: bool
    action_dim: int
    proprio_dim: int

    def fields(self, image_size: int) -> list[BufferField]:
        fields = [BufferField("ahead", "<i8")]
        if self.target:
            fields.append(BufferField("target", "|u1", (image_size, image_size, 3)))
        if self.action_dim:
            fields += [
                BufferField("actions", "<f4", (self.horizon, self.action_dim)),
                BufferField("mask", "|b1", (self.horizon,)),
            ]
        if self.proprio_dim:
            fields.append(BufferField("proprio", "<f4", (self.proprio_dim,)))
        return fields


@dataclass(frozen=True)
class ReaderSpec:
    """The specification sent to a worker once as JSON; the shards' file is inherited instead."""

    file: ColumnFile  # file that holds the shards
    shards: Shards
    shard_source: NDArray[np.int64]  # (shards,) index into sources
    sources: Sequence[str]
    image_size: int
    batch: int
    slots: int
    seed: int
    augment: dict[str, Any] | None  # the recipe's data.augment
    latents: CacheSpec | None
    states: CacheSpec | None
    each: bool  # read the states of each frame up to the target; needs a window
    views: Sequence[Shards]  # shards of each camera after the first, in the order of the samples
    window: Window | None
    skip: bool  # replace unreadable frames by others
    cache: str  # cache folder; its shards are removed when not in use

    def memory(self, fd: int | None = None) -> SharedBuffers:
        """The slots in this spec's layout; `fd` of the process that created them."""
        fields = [BufferField("images", "|u1", (self.image_size, self.image_size, 3))]
        if self.latents is not None:
            fields.append(BufferField("latents", "<u2", self.latents.shape))
        if self.states is not None:
            dtype, shape = self.states.dtype, self.states.shape
            fields.append(BufferField("state", dtype, shape))
            if self.each and self.window is not None:
                fields.append(BufferField("next_states", dtype, (self.window.horizon, *shape)))
            else:
                fields.append(BufferField("target_state", dtype, shape))
        if self.views:
            fields.append(BufferField("views", "|u1", (len(self.views), self.image_size, self.image_size, 3)))
        if self.window is not None:
            fields += self.window.fields(self.image_size)
        return SharedBuffers(fields, self.batch, self.slots, fd)

    def dumps(self) -> bytes:
        fields = {name: value for name, value in vars(self).items() if name != "file"}
        return json.dumps(
            {
                **fields,
                "shards": self.shards.numbers,
                "shard_source": self.shard_source[self.shards.starts[:-1]].tolist(),
                "views": [shards.numbers for shards in self.views],
                "latents": None if self.latents is None else astuple(self.latents),
                "states": None if self.states is None else astuple(self.states),
                "window": None if self.window is None else astuple(self.window),
            }
        ).encode()

    @classmethod
    def loads(cls, text: bytes, fd: int) -> ReaderSpec:
        """`fd`: of the file that holds the shards."""
        raw: dict[str, Any] = json.loads(text)
        raw["file"] = file = ColumnFile(fd)
        views = [
            Shards([ShardTable.unpacked(file, number) for number in view]) for view in (raw["shards"], *raw["views"])
        ]
        raw["shards"], raw["views"] = views[0], views[1:]
        raw["shard_source"] = np.repeat(raw["shard_source"], np.diff(views[0].starts))
        for kind in ("latents", "states"):
            if raw[kind] is not None:
                of, fingerprint, shape, precision = raw[kind]
                raw[kind] = CacheSpec(of, fingerprint, tuple(shape), precision)
        raw["window"] = raw["window"] and Window(*raw["window"])
        return cls(**raw)


class BatchReader:
    """Reads batches into slots."""

    def __init__(self, spec: ReaderSpec, buffers: SharedBuffers):
        self._spec, self._buffers = spec, buffers
        self._shards = _open(spec.shards, spec.cache)
        self._first = _first_samples(spec.shards)
        self._views = [(_open(shards, spec.cache), _first_samples(shards)) for shards in spec.views]
        self._latents = CacheFiles(spec.latents, spec.shards) if spec.latents else None
        self._states = CacheFiles(spec.states, spec.shards) if spec.states else None
        horizon = spec.window.horizon if spec.window else 0
        self._masks = np.arange(horizon) < np.arange(horizon + 1)[:, None]  # (actions there are, horizon)
        self._context = [
            (0, 0, b"", b"")
        ] * spec.batch  # frames ahead, actions, their bytes, those of the proprioception
        self._steps = [self._read_context, self._decode] if spec.window else [self._decode]
        self._augment = None
        if spec.augment is not None:
            from stamo_dist.data.transforms import augmentation

            self._augment = augmentation(**spec.augment, seed=spec.seed)

    def fill(self, slot: int, rows: int) -> list[str]:
        """Read the samples whose numbers are in the first `rows` of a slot into it.

        Returns messages about replaced samples.

        Raises:
            DataError: A shard, sample or latent is missing or corrupt; names the source, shard, sample and episode.
        """
        views = self._buffers.rows(slot, rows)
        samples = views["samples"]
        numbers = np.searchsorted(self._first, samples, side="right") - 1
        places = list(zip(numbers.tolist(), (samples - self._first[numbers]).tolist(), strict=True))
        reading = views["shard"]
        views["replaced"][:] = False
        wrong: dict[int, str] = {}
        # In one loop, because decoding evicts the CPU's caches: code between two frames runs at half speed.
        for step in self._steps:
            for k, (number, row) in enumerate(places):
                if k in wrong:
                    continue
                reading[0] = number
                try:
                    step(k, number, row, views)
                except DataError as e:
                    wrong[k] = f"source {self._spec.sources[self._spec.shard_source[number]]}: {e}"
                    if not self._spec.skip:
                        raise DataError(wrong[k]) from None
        for k, problem in wrong.items():
            self._read_another(k, *places[k], views, problem)
            views["replaced"][k] = True
        if self._spec.window is not None:
            self._write_context(self._spec.window, views)
        return list(wrong.values())

    def forget(self, places: Iterable[Place]) -> None:
        """Unmap these shards."""
        for view, number in places:
            if view:
                self._views[view - 1][0].forget(number)
                continue
            for mapped in (self._shards, self._latents, self._states):
                if mapped is not None:
                    mapped.forget(number)

    def _decode(self, k: int, number: int, row: int, views: dict[str, NDArray[Any]]) -> None:
        shard = self._shards[number]
        shard.frame(row, views["images"][k])
        if "target" in views:
            shard.frame(row + self._context[k][0], views["target"][k])
        for v, (shards, first) in enumerate(self._views):
            sample = int(self._first[number]) + row
            other = int(np.searchsorted(first, sample, side="right")) - 1
            shards[other].frame(sample - int(first[other]), views["views"][k][v])
        if self._augment is not None:
            # The target gets the frame's augmentation, so that they differ only by motion.
            for name in ("images", "target"):
                if name in views:
                    self._augment(views[name][k], int(views["epochs"][k]), int(views["samples"][k]))
            for v, frame in enumerate(views["views"][k] if self._views else (), 1):
                self._augment(frame, int(views["epochs"][k]), int(views["samples"][k]), v)
        if self._latents is not None:
            views["latents"][k] = self._latents[number][row].view(np.uint16)
        if self._states is not None:
            states, ahead = self._states[number], self._context[k][0]
            views["state"][k] = states[row]
            if "next_states" in views:
                views["next_states"][k][:ahead] = states[row + 1 : row + 1 + ahead]
                views["next_states"][k][ahead:] = 0
            else:
                views["target_state"][k] = states[row + ahead]

    def _read_context(self, k: int, number: int, row: int, views: dict[str, NDArray[Any]]) -> None:
        window, shard = self._spec.window, self._shards[number]
        assert window is not None
        t, length, proprio = shard.timestep(row)
        source = self._spec.shard_source[number]
        horizon, chunk = window.horizons[source], window.chunks[source]
        n, actions = 0, b""
        if window.action_dim:
            n = min(chunk, length - t) if "action" in shard else 0
            actions = shard.run(row, row + n, "action") if n else b""
        self._context[k] = min(horizon, length - 1 - t), n, actions, proprio

    def _write_context(self, window: Window, views: dict[str, NDArray[Any]]) -> None:
        """Write the context of all frames of the batch with one numpy call per field, as calls cost more than rows."""
        ahead, counts, actions, proprio = zip(*self._context[: len(views["ahead"])], strict=True)
        views["ahead"][:] = ahead
        if window.action_dim:
            _write_padded(views["actions"], actions)
            views["mask"][:] = self._masks[list(counts)]
        if window.proprio_dim:
            _write_padded(views["proprio"], proprio)

    def _read_another(self, k: int, number: int, row: int, views: dict[str, NDArray[Any]], problem: str) -> None:
        """Fill row `k` with the next readable frame of the shard or of the source's next shards; deterministic.

        Raises:
            DataError: No frame that was tried can be read.
        """
        for other, i in self._others(number, row):
            try:
                for step in self._steps:
                    step(k, other, i, views)
                return
            except DataError:
                continue
            finally:
                if other != number:
                    self.forget([(0, other)])  # not part of the plan, so it is never forgotten on request
        raise DataError(f"{problem}; nor can {_TRIES} frames that might stand in for it")

    def _others(self, number: int, row: int) -> Iterator[tuple[int, int]]:
        counts, owner = self._spec.shards.samples, self._spec.shard_source
        for i in range(1, min(_TRIES // 2, int(counts[number]))):
            yield number, (row + i) % int(counts[number])
        siblings = np.flatnonzero(owner == owner[number])
        siblings = np.roll(siblings, -1 - np.searchsorted(siblings, number))[:-1]  # from the next one on
        for other in siblings[: _TRIES // 2].tolist():
            yield other, row % int(counts[other])


def _open(shards: Shards, cache: str) -> OpenShards:
    below = os.path.join(cache, "")
    return OpenShards(
        shards, open_shard=lambda number: MappedShard(shards[number], cached=shards[number].path.startswith(below))
    )


def _first_samples(shards: Shards) -> NDArray[np.int64]:
    return shards.samples.cumsum() - shards.samples


def _write_padded(out: NDArray[Any], rows: Sequence[bytes]) -> None:
    """Copy each row's bytes into `out` and zero the rest of the row."""
    size = out.nbytes // len(out)
    out[:] = np.frombuffer(b"".join([row.ljust(size, b"\0") for row in rows]), out.dtype).reshape(out.shape)
