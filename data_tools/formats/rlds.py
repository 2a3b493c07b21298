"""RLDS: TFDS folders of robot episodes (Open X-Embodiment, Bridge, DROID, OpenVLA's LIBERO), without TensorFlow.

The values equal those of tensorflow_datasets; images stay the PNG or JPEG bytes that are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.formats import remarks, tfds, tfrecord
from data_tools.formats.declared import absolute_gripper, upright
from data_tools.formats.rlds_layout import RldsLayout, RldsOptions, resolve_layout, texts
from data_tools.formats.rotations import pose_vectors
from data_tools.formats.source import EpisodeData, EpisodeRef, Frames, Scan, pick
from data_tools.images import decode
from stamo_dist.errors import DataError

#: Files whose headers are read concurrently: the scan is bound by the file system, not the CPU.
SCAN_THREADS = 8
WAY = "--set instruction=KEY"
#: Values of `episode_metadata/success`.
SUCCESS = (True, "true", "True", "success")
#: An image whose maximum is below this counts as black.
BLACK = 8
#: A first action with less motion is taken for the zero action with which Bridge's episodes begin.
STILL = 1e-5


class RldsReader(RldsOptions):
    """Reads a TFDS folder NAME/VERSION of RLDS episodes.

    Known datasets need no option. For others give what RLDS omits: `rate_hz` and `mode`, and unless mode is "other"
    `rotation` and `gripper`. Keys are names below `steps/`.
    """

    @cached_property
    def dataset(self) -> tfds.Dataset:
        return tfds.open_dataset(Path(self.src))

    @cached_property
    def layout(self) -> RldsLayout:
        """The keys and conventions selected by the options, the preset and features.json."""
        return resolve_layout(self, self.dataset)

    def scan(self) -> Scan:
        dataset, layout = self.dataset, self.layout
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            scanned = list(pool.map(self._scan_shard, dataset.shards))
        episodes = [episode for found, _ in scanned for episode in found]
        bad = [reason for _, reasons in scanned for reason in reasons]
        black = self._black(episodes)
        taken, notes = remarks.succeeded(episodes, self.only_successful)
        notes = [*layout.notes, *notes, *remarks.unsaid_instructions(taken, self._like_language(), WAY)]
        notes += [f"cameras: {camera} is black in the first episode" for camera in black]
        return Scan(
            episodes=taken,
            files=[
                path
                for path in (
                    dataset.folder / tfds.INFO,
                    dataset.folder / tfds.FEATURES,
                    *(s.path for s in dataset.shards),
                )
                if path.is_file()
            ],
            cameras=list(layout.cameras),
            rate_hz=layout.rate_hz,
            action=layout.spec,
            proprio_dim=sum(dataset.steps[k].size for k in layout.proprio),
            options={**layout.options, "black_cameras": black, "only_successful": self.only_successful},
            bad=bad,
            notes=notes,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        note = episode.private
        record = tfrecord.Record(note["number"], note["offset"], note["bytes"])
        data = tfrecord.read_record(self.dataset.folder / episode.file, record)
        found = tfds.read_features(data)
        layout, steps = self.layout, self.dataset.steps

        length = self._count(data, found)

        def columns(keys: Sequence[str]) -> np.ndarray:
            parts = [tfds.read_tensor(data, found, k, steps[k]) for k in keys]
            if wrong := {k: len(p) for k, p in zip(keys, parts, strict=True) if len(p) != length}:
                raise DataError(f"lengths differ: {length} steps, " + ", ".join(f"{k} {n}" for k, n in wrong.items()))
            flat = [p.reshape(len(p), -1).astype(np.float32, copy=False) for p in parts]
            return np.concatenate([np.zeros((length, 0), np.float32), *flat], axis=1)

        actions = columns(layout.action)
        if layout.relative_gripper:
            actions = np.column_stack([actions[:, :-1], absolute_gripper(actions[:, -1])])
        motion = actions[:1, : layout.spec.gripper if layout.spec else 0]
        first = int(layout.drop_first and motion.size > 0 and np.abs(motion).max() < STILL)
        return EpisodeData(
            frames={
                c: upright(self._frames(data, found, key, length, first), layout.orientation)
                for c, key in layout.cameras.items()
            },
            times=np.arange(length - first) / layout.rate_hz,
            actions=actions[first:],
            proprio=columns(layout.proprio)[first:],
            pose=pose_vectors(columns([layout.pose[0]])[first:], layout.pose[1]) if layout.pose else None,
            instructions=self._texts(data, found, length, first, note["instruction"]),
        )

    def _scan_shard(self, shard: tfds.Shard) -> tuple[list[EpisodeRef], list[str]]:
        split = "val" if shard.split in tfds.VAL_NAMES else shard.split
        name = f"{shard.split}/{shard.number:05d}"
        if not shard.path.is_file():
            why = f"{shard.path.name} is missing, which {tfds.INFO} names"
            return [], [f"{name}/{k:06d}: {why}" for k in range(shard.episodes or 1)]
        records, rest = tfrecord.scan_records(shard.path)
        episodes, bad = [], []
        with shard.path.open("rb") as file:
            fetch = tfrecord.window(file.fileno())
            for record in records:
                id = f"{name}/{record.number:06d}"
                try:
                    episodes.append(self._scan_record(id, split, shard.path, fetch, record))
                except DataError as e:
                    bad.append(f"{id}: {shard.path.name}, record {record.number}: {e}")
        lost = range(len(records), max(shard.episodes or 0, len(records) + bool(rest)))
        if lost and not rest:
            rest = f"ends after {len(records)} of {shard.episodes} records"
        bad += [f"{name}/{k:06d}: {shard.path.name}, record {k}: {rest}" for k in lost]
        return episodes, bad

    def _scan_record(
        self, id: str, split: str, path: Path, fetch: tfrecord.Fetch, record: tfrecord.Record
    ) -> EpisodeRef:
        steps = self.dataset.steps
        try:
            found = tfrecord.features(fetch, record.offset, record.offset + record.length)
            length = tfds.count_steps(fetch, found, steps)
        except DataError:
            tfrecord.read_record(path, record)  # a wrong checksum explains more, so it is reported instead
            raise
        if length < 1:
            raise DataError("has no steps")
        meta = tfds.read_metadata(fetch, found, self.dataset.features)
        if "success" in meta:
            meta["success"] = meta["success"] in SUCCESS
        key, text = self._first_text(fetch, found)
        return EpisodeRef(
            id=id,
            file=path.name,
            key=str(record.number),
            length=length,
            instruction=text,
            split=split,
            meta=meta,
            private={"instruction": key, "number": record.number, "offset": record.offset, "bytes": record.length},
        )

    def _frames(self, data: bytes, found: Mapping[str, tfrecord.Values], key: str, length: int, first: int) -> Frames:
        feature = self.dataset.steps[key]
        if feature.kind == "tensor":
            pixels = tfds.read_tensor(data, found, key, feature).astype(np.uint8)
            _check_count(key, len(pixels), length)
            return pick(pixels[first:])
        encoded = tfds.read_bytes(data, found, key)
        _check_count(key, len(encoded), length)

        return lambda indices: (encoded[first + i] for i in indices)

    def _first_text(self, fetch: tfrecord.Fetch, found: Mapping[str, tfrecord.Values]) -> tuple[str | None, str]:
        """The first instruction key with a text, and that text; the first step is searched before the others."""
        for first in (True, False):
            for key in self.layout.instruction:
                said = tfds.read_texts(fetch, found, key, self.dataset.features[key], first)
                if text := next((text for text in said if text), ""):
                    return key, text
        return None, ""

    def _texts(
        self, data: bytes, found: Mapping[str, tfrecord.Values], length: int, first: int, key: str | None
    ) -> list[str] | None:
        """Each step's instruction, if it changes within the episode."""
        if key is None or not key.startswith("steps/"):
            return None
        said = tfds.read_texts(lambda a, b: data[a:b], found, key, self.dataset.features[key])
        if len(said) != length:
            raise DataError(f"{key} has {len(said)} texts for {length} steps")
        return said[first:] if len(set(said)) > 1 else None

    def _like_language(self) -> list[str]:
        """Unused text keys that may be instructions."""
        named = (k for k in texts(self.dataset) if k not in self.layout.instruction)
        return [k.removeprefix("steps/") for k in named if remarks.looks_like_language(k)]

    def _count(self, data: bytes, found: Mapping[str, tfrecord.Values]) -> int:
        return tfds.count_steps(lambda a, b: data[a:b], found, self.dataset.steps)

    def _black(self, episodes: Sequence[EpisodeRef]) -> list[str]:
        """Cameras whose middle image in the first episode is black."""
        if not episodes:
            return []
        try:
            data = self.read(episodes[0])
            middle = len(data.times) // 2
            black = []
            for camera, frames in data.frames.items():
                for frame in frames([middle]):
                    image = frame if isinstance(frame, np.ndarray) else decode(frame)
                    if image.max(initial=0) < BLACK:
                        black.append(camera)
            return black
        except DataError:  # reported and counted when the episode is converted
            return []


def _check_count(key: str, count: int, length: int) -> None:
    if count != length:
        raise DataError(f"steps/{key} has {count} pictures for {length} actions")
