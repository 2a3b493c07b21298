"""Frames/s of `stamo data convert` per core beside its limit: decoding and encoding the same frames, and nothing else.

python benchmarks/convert.py [--only libero lerobot] [--repeats 5] [--size 256]

The limit decodes with the same library (h5py, simplejpeg or Pillow, PyAV), brings the frames to the same size with the
same function and encodes them with simplejpeg at the same quality: no driver, no reader, no times, no actions, no
shards, no checksums. Converter and limit take turns in one process; a frame is one picture of one camera. Rates are per
second of CPU time, so other work on the machine matters little; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import simplejpeg
from layouts import (
    write_aloha,
    write_calvin,
    write_droid,
    write_maniskill,
    write_metaworld,
    write_robomimic,
    write_rosbag,
    write_zarr,
)
from rich.console import Console
from rich.table import Table

from data_tools.convert.driver import convert
from data_tools.convert.plan import Settings, make_plan
from data_tools.images import decode, encode_frames

QUALITY = 95
DROID_STEPS = 100
HDF5: dict[str, dict[str, Any]] = {
    "libero": {"image_timing": "before"}, "robomimic": {}, "maniskill": {}, "metaworld": {},
}  # fmt: skip
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "libero": Path.symlink_to, "robomimic": write_robomimic, "maniskill": write_maniskill, "metaworld": write_metaworld,
}  # fmt: skip
COPIES = 4  # of small sources, so that what a conversion costs once is small beside what a frame costs

Frames = Iterator[np.ndarray]


def hdf5_frames(files: Iterable[Path]) -> Frames:
    """Every picture below the groups of each file that has an action of its own: ManiSkill's last one has none."""
    for path in files:
        with h5py.File(path) as file:
            for episode in file["data"].values() if "data" in file else file.values():
                length = len(episode["actions"])
                for images in _pictures(episode["obs"]):
                    yield from images[:length][:, ::-1]


def _pictures(group: h5py.Group) -> Iterator[h5py.Dataset]:
    for child in group.values():
        if isinstance(child, h5py.Group):
            yield from _pictures(child)
        elif child.ndim == 4:
            yield child


def video_frames(files: Iterable[Path]) -> Frames:
    import av
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    for path in files:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                yield convert.reformat(frame, format="rgb24", threads=1).to_ndarray()


def calvin_frames(files: Iterable[Path]) -> Frames:
    for path in files:
        with np.load(path) as arrays:
            yield from (arrays["rgb_static"], arrays["rgb_gripper"])


def aloha_frames(files: Iterable[Path]) -> Frames:
    for path in files:
        with h5py.File(path) as file:
            for images in file["observations/images"].values():
                yield from (decode(row.tobytes().rstrip(b"\0")) for row in images)


def zarr_frames(path: Path) -> Frames:
    import zarr

    images = zarr.open_group(str(path), mode="r")["data/img"]
    for start in range(0, images.shape[0], images.chunks[0]):
        yield from images[start : start + images.chunks[0]]


def bag_frames(files: Iterable[Path]) -> Frames:
    from rosbags.highlevel import AnyReader

    for path in files:
        with AnyReader([path]) as bag:
            for connection, _, content in bag.messages([c for c in bag.connections if "Image" in c.msgtype]):
                message = bag.deserialize(content, connection.msgtype)
                raw = connection.topic.endswith("raw")
                yield message.data.reshape(480, 640, 3) if raw else decode(message.data.tobytes())


def stored_images(format: str, src: Path, options: dict[str, Any]) -> list[bytes]:
    """The encoded images of a source, in memory."""
    plan = make_plan(format, src, "s", Settings(options=options))
    images: list[bytes] = []
    for episode in (e for episodes in plan.splits.values() for e in episodes):
        data = plan.job.reader.read(episode)
        for camera in plan.manifest.cameras:
            images += [bytes(image) for image in data.frames[camera](range(len(data.times)))]
    return images


def copied_rlds(src: Path, target: Path) -> Path:
    """The same data set with each of its files' records `COPIES` times."""
    target.mkdir()
    info = json.loads((src / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["shardLengths"] = [str(COPIES * int(n)) for n in split["shardLengths"]]
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(src / "features.json", target)
    for file in src.glob("*.tfrecord-*"):
        (target / file.name).write_bytes(COPIES * file.read_bytes())
    return target


class Case:
    """One format, its data, and how to decode them without a reader."""

    def __init__(self, format: str, src: Path, size: int, decoded: Callable[[], Frames], options: dict[str, Any]):
        self.format, self.src, self.size, self.decoded, self.options = format, src, size, decoded, options

    def limit(self) -> tuple[int, float]:
        """Frames and CPU seconds."""
        subsampling = "444" if self.size < 128 else "420"
        n = 0
        began = time.process_time()
        for frame in self.decoded():
            if frame.shape[:2] == (self.size, self.size):
                square = np.ascontiguousarray(frame)
                simplejpeg.encode_jpeg(square, quality=QUALITY, colorspace="RGB", colorsubsampling=subsampling)
            else:
                encode_frames([frame], [n], self.size, "crop", QUALITY)
            n += 1
        return n, time.process_time() - began

    def converter(self, out: Path) -> tuple[int, float]:
        """Frames and CPU seconds."""
        began = time.process_time()
        manifest, _ = convert(
            self.format, self.src, out, size=self.size, quality=QUALITY, processes=1, quiet=True, options=self.options
        )
        used = time.process_time() - began
        return sum(split.frames for split in manifest.splits.values()) * len(manifest.cameras), used


def cases(shared: Path, root: Path, size: int) -> Iterator[Case]:
    """The formats that there is data for."""
    libero = shared / "libero_spatial_task2_128.hdf5"
    if libero.is_file():
        for format, options in HDF5.items():
            files = [root / format / f"{i}.hdf5" for i in range(COPIES)]
            (root / format).mkdir()
            for file in files:
                WRITERS[format](file, libero)
            yield Case(format, root / format, 128, partial(hdf5_frames, files), options)
        yield from made_cases(libero, root, size)
    bridge = shared / "bridge_rlds" / "1.0.0"
    if bridge.is_dir():
        bridge = copied_rlds(bridge, root / "rlds")
        images = stored_images("rlds", bridge, {})
        # To 48 px a frame costs so little that what an episode of nine frames costs shows.
        for side in (48, size):
            yield Case("rlds", bridge, side, lambda: map(decode, images), {})
    lerobot = shared / "lerobot_v3_libero"
    if lerobot.is_dir():
        videos = sorted(lerobot.rglob("*.mp4"))
        yield Case("lerobot", lerobot, size, lambda: video_frames(videos), {})
    human = shared / "human_video"
    if human.is_dir():
        films = sorted(human.glob("*.mp4"))
        yield Case("video", human, size, lambda: video_frames(films), {})
        droid = write_droid(root / "droid-raw", video_frames(films), DROID_STEPS)
        recordings = sorted(droid.rglob("*.mp4"))
        yield Case("droid-raw", droid, size, lambda: video_frames(recordings), {})


def made_cases(libero: Path, root: Path, size: int) -> Iterator[Case]:
    """LIBERO's pictures in layouts of which there is no real set here."""
    calvin = write_calvin(root / "calvin", libero)
    frames = sorted(calvin.rglob("episode_*.npz"))
    yield Case("calvin", calvin, 128, lambda: calvin_frames(frames), {})
    (root / "aloha").mkdir()
    episodes = [write_aloha(root / "aloha" / f"{i}.hdf5", libero) for i in range(COPIES)]
    yield Case("aloha", root / "aloha", size, lambda: aloha_frames(episodes), {})
    if find_spec("zarr"):
        buffer = write_zarr(root / "a.zarr", libero)
        yield Case("zarr", buffer, 96, lambda: zarr_frames(buffer), {"rate_hz": 10.0, "mode": "other"})
    if find_spec("rosbags"):
        bags = [write_rosbag(root / "rosbag" / f"{i}", libero) for i in range(COPIES)]
        yield Case("rosbag", root / "rosbag", size, lambda: bag_frames(bags), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("STAMO_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder with the real data of the tests")
    parser.add_argument("--only", nargs="+", help="formats to measure")
    parser.add_argument("--size", type=int, default=256, help="side of the frames made from videos")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="stamo-benchmark-"))
    table = Table(title=f"frames per second of one core; medians of {options.repeats} turns")
    for column in ("format", "frames", "limit", "converter", "share of the limit"):
        table.add_column(column, justify="left" if column == "format" else "right")
    try:
        for case in cases(options.data, root, options.size):
            if not options.only or case.format in options.only:
                table.add_row(*measure(case, root, options.repeats))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    Console().print(table)


def measure(case: Case, root: Path, repeats: int) -> list[str]:
    """A row of the table."""
    limits, rates = [], []
    for turn in range(repeats + 1):
        expected, used = case.limit()
        limit = expected / used
        out = root / "out"
        frames, used = case.converter(out)
        shutil.rmtree(out)
        if frames != expected:
            raise SystemExit(f"{case.format}: the converter wrote {frames} frames, the limit has {expected}")
        if turn:  # the first turn imports and warms the page cache
            limits.append(limit)
            rates.append(frames / used)
    share = statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True))
    return [
        f"{case.format}, to {case.size} px",
        f"{frames:,}",
        f"{statistics.median(limits):,.0f}",
        f"{statistics.median(rates):,.0f}",
        f"{share:.2f}",
    ]


if __name__ == "__main__":
    main()
