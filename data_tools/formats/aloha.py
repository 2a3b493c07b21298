"""ALOHA's and ACT's HDF5 (https://github.com/tonyzhaozh/act): one file an episode.

attrs: sim, compress
action (T, 14)                 joints to reach: left arm 6, gripper, right arm 6, gripper
observations/qpos (T, 14), qvel, effort
observations/images/CAMERA     (T, H, W, 3) uint8, or JPEGs: (T, N) uint8 padded with zeros, or of any length
compress_len (cameras, T)      lengths of the padded JPEGs; not needed, as no JPEG ends in a zero
base_action (T, 2)             Mobile ALOHA
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np

from data_tools.formats import hdf5, remarks
from data_tools.formats.checked import flag
from data_tools.formats.declared import ImageOptions, not_one_of, not_positive, orientation_problems, upright
from data_tools.formats.hdf5_language import find_texts, like_language
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan, chosen, columns, find_files
from data_tools.images import decode
from stamo_dist.errors import DataError

IMAGES = "observations/images"
#: Mobile ALOHA's base action, which ACT does not use.
BASE = "base_action"
#: DT = 0.02 s in ACT's constants.
RATE_HZ = 50.0
#: Dimensions of one and of two ViperX arms with their grippers.
ONE_ARM, TWO_ARMS = 7, 14
Channels = Literal["rgb", "bgr"]


@dataclass
class AlohaReader(ImageOptions):
    """Reads an episode_0.hdf5 of ALOHA or ACT, or a folder of them; also Mobile ALOHA's.

    observations[t] were taken before action[t]. Actions are joints to reach and kept as they are.

    Args:
        src: A .hdf5 file or a folder, searched recursively; a file is an episode.
        cameras: Cameras to convert (`observations/images/CAMERA`); all when omitted.
        action: Keys whose numbers, side by side, are the action; `action` when omitted ("action,base_action" for
            Mobile ALOHA's base); "none" for none.
        proprio: Keys of the proprioception; `observations/qpos` when omitted; "none" for none.
        rate_hz: Steps per second; ALOHA's 50 when omitted.
        instruction: For episodes that have none.
        channels: Order of the stored colours, also of JPEGs: "rgb", or "bgr" for recordings that were encoded with
            their channels swapped.
        image_orientation: See `ImageOptions`.
        only_successful: Leave out episodes whose `success` is false.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action: Sequence[str] = ()  # default () instead of None, so that "none" is a value; likewise below
    proprio: Sequence[str] = ()
    rate_hz: float | None = None
    instruction: str | None = None
    channels: Channels = "rgb"
    only_successful: bool = False

    def scan(self) -> Scan:
        src = Path(self.src)
        files = find_files(src, hdf5.SUFFIXES)
        problems = self._check_options()
        agreement = hdf5.Agreement()
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        candidates: set[str] = set()
        bases = 0
        for path in files:
            id = hdf5.relative(src, path).removesuffix(path.suffix)
            try:
                with hdf5.open_file(path) as file:
                    if fault := self._fault(file):
                        raise DataError(fault)
                    episodes.append(self._reference(path, id, file, agreement))
                    bases += BASE in file and BASE not in self._keys(file)
                    if not episodes[-1].instruction:
                        candidates.update(name.removeprefix("/") for name in like_language([file]))
            except DataError as e:
                bad.append(f"{id}: {e}")
        if not episodes:
            problems.append(f"{src}: none of its {len(files)} files can be used; {bad[0]}")
        if problems := problems + agreement.problems():
            raise DataError("\n".join(problems))
        episodes, notes = remarks.succeeded(episodes, self.only_successful)
        notes += remarks.unsaid_instructions(episodes, candidates)
        if not agreement["proprio keys"] and not self.proprio:
            notes += remarks.no_proprio(agreement["numeric keys"])
        if self.rate_hz is None:
            notes.append(f"rate: taken as ALOHA's {RATE_HZ:g} Hz; for another give --set rate_hz=HZ")
        if bases:
            notes.append(f"action: {bases} episodes have {BASE}, left out; --set action=action,{BASE} takes it too")
        return Scan(
            episodes=episodes,
            files=files,
            cameras=list(agreement["cameras"]),
            rate_hz=float(self.rate_hz or RATE_HZ),
            action=agreement["actions"],
            proprio_dim=agreement["proprio dimensions"],
            options={
                "action": list(agreement["action keys"]),
                "proprio": list(agreement["proprio keys"]),
                "channels": self.channels,
                "image_orientation": self.image_orientation,
                "only_successful": self.only_successful,
            },
            bad=bad,
            notes=notes,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = hdf5.located(Path(self.src), episode.file)
        with hdf5.open_file(path) as file:
            length = episode.length
            return EpisodeData(
                frames={
                    c: upright(_frames(path, file[f"{IMAGES}/{c}"], self.channels), self.image_orientation)
                    for c in self._cameras(file)
                },
                times=np.arange(length) / float(self.rate_hz or RATE_HZ),
                actions=columns(file, self._keys(file), length),
                proprio=columns(file, self._proprio(file), length),
                instructions=find_texts([file]) if episode.private["by_step"] else None,
            )

    def _check_options(self) -> list[str]:
        problems = orientation_problems(self.image_orientation)
        problems += not_one_of(get_args(Channels), channels=self.channels)
        return problems + not_positive(rate_hz=self.rate_hz)

    def _keys(self, file: h5py.File) -> list[str]:
        return chosen(self.action or ("action",), (), file)

    def _proprio(self, file: h5py.File) -> list[str]:
        return chosen(self.proprio, ("observations/qpos",), file)

    def _cameras(self, file: h5py.File) -> list[str]:
        there = hdf5.node(file, IMAGES)
        return list(self.cameras or (sorted(there) if isinstance(there, h5py.Group) else ()))

    def _fault(self, file: h5py.File) -> str | None:
        """Why a file cannot be used, judged by shapes and types alone; None if it can."""
        numbers = [*self._keys(file), *self._proprio(file)]
        keys = [*numbers, *(f"{IMAGES}/{c}" for c in self._cameras(file) or ["CAMERA"])]
        if missing := hdf5.missing_keys(file, keys):
            return missing
        faults = hdf5.number_faults(file, numbers)
        for images in (file[f"{IMAGES}/{c}"] for c in self._cameras(file)):
            if not hdf5.is_images(images) and not _is_encoded(images):
                faults.append(f"{images.name} is {images.dtype} {images.shape}, not RGB (T, H, W, 3) nor JPEGs (T, N)")
        lengths = {key: len(file[key]) for key in keys}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            faults.append("lengths differ: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
        return "; ".join(faults) or None

    def _reference(self, path: Path, id: str, file: h5py.File, agreement: hdf5.Agreement) -> EpisodeRef:
        cameras, keys, proprio = self._cameras(file), self._keys(file), self._proprio(file)
        length = len(file[f"{IMAGES}/{cameras[0]}"])
        texts = find_texts([file], length)
        agreement.note(
            id,
            {
                "cameras": tuple(cameras),
                "action keys": tuple(keys),
                "actions": action_spec(keys, sum(int(np.prod(file[k].shape[1:])) for k in keys)) if keys else None,
                "proprio keys": tuple(proprio),
                "proprio dimensions": sum(int(np.prod(file[k].shape[1:])) for k in proprio),
                **({} if proprio else {"numeric keys": tuple(hdf5.numeric(file))}),
            },
        )
        meta: dict[str, Any] = {} if (success := hdf5.success(file)) is None else {"success": success}
        if "sim" in file.attrs:
            meta["sim"] = flag(hdf5.attribute(file, "sim"), hdf5.place(file, "sim"))
        return EpisodeRef(
            id=id,
            file=hdf5.relative(Path(self.src), path),
            key="",
            length=length,
            task=path.resolve().parent.name,
            instruction=next((text for text in texts if text), self.instruction or ""),
            meta=meta,
            private={"by_step": len(texts) == length and len(set(texts)) > 1},
        )


def action_spec(keys: Sequence[str], dim: int) -> ActionSpec:
    """Joints to reach, of one arm or two; the grippers are 1 open, 0 closed already."""
    text = f"ALOHA {' + '.join(keys)}: {dim} numbers as stored"
    if list(keys) == ["action"] and dim == TWO_ARMS:
        text = "ALOHA: joints to reach, left arm 6, gripper (dimension 6), right arm 6, gripper (13); 1 open 0 closed"
    if list(keys) == ["action"] and dim == ONE_ARM:
        text = "ALOHA: joints to reach, 6, gripper 1 open 0 closed"
        return ActionSpec(dim=dim, text=text, mode="other", gripper=dim - 1)
    return ActionSpec(dim=dim, text=text, mode="other")


def _is_encoded(images: h5py.Dataset) -> bool:
    """Whether the frames are JPEGs: rows of bytes, zero-padded or of variable length."""
    variable = h5py.check_vlen_dtype(images.dtype)
    padded = images.ndim == 2 and images.dtype == np.uint8
    return padded or (images.ndim == 1 and (variable == np.uint8 or images.dtype.kind in "SV"))


def _frames(path: Path, images: h5py.Dataset, channels: Channels) -> Frames:
    """The stored frames as RGB."""
    name = images.name
    stored = hdf5.read_frames(path, name) if hdf5.is_images(images) else _encoded(path, name)
    if channels == "rgb":
        return stored

    def swapped(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        for frame in stored(indices):
            yield (decode(frame) if isinstance(frame, bytes) else frame)[..., ::-1]

    return swapped


def _encoded(path: Path, name: str) -> Frames:
    def frames(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        with hdf5.open_file(path) as file:
            images = file[name]
            for i in indices:
                row = images[i]
                yield (row.tobytes() if isinstance(row, (np.ndarray, np.void)) else bytes(row)).rstrip(b"\0")

    return frames
