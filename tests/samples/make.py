"""Makes the samples beside this file from the sets that README.md names: python tests/samples/make.py ORIGINALS."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import av
import h5py

from data_tools.formats import tfrecord

HERE = Path(__file__).parent
LIBERO, BRIDGE = "libero_spatial_task2_128.hdf5", "bridge_rlds/1.0.0"
LENGTHS = (36, 21, 18)  # frames of each LIBERO episode that are kept, from its first
EPISODES = 7  # of each split of Bridge, from its first
FRAMES = 206  # of each video


def libero(source: Path, out: Path) -> None:
    """The first frames of every episode, all else as it is but the simulator's model."""
    with h5py.File(source) as real, h5py.File(out, "w") as file:
        data = file.create_group("data")
        data.attrs.update(real["data"].attrs)
        data.attrs["total"] = sum(LENGTHS)
        for index, length in enumerate(LENGTHS):
            demo, kept = real[f"data/demo_{index}"], data.create_group(f"demo_{index}")
            kept.attrs["num_samples"] = length
            for key in [*(k for k in demo if k != "obs"), *(f"obs/{k}" for k in demo["obs"])]:
                rows = demo[key][:length]
                chunks = (1, *rows.shape[1:]) if key.endswith("_rgb") else True
                kept.create_dataset(key, data=rows, chunks=chunks, compression="gzip", compression_opts=9)


def bridge(source: Path, out: Path) -> None:
    """The first episodes of each split; of dataset_info.json the lengths."""
    out.mkdir(parents=True)
    shutil.copyfile(source / "features.json", out / "features.json")
    shutil.copyfile(source.parent / "OCTO_LICENSE", out.parent / "OCTO_LICENSE")
    info = json.loads((source / "dataset_info.json").read_text())
    for split in info["splits"]:
        name = f"{info['name']}-{split['name']}.tfrecord-00000-of-00001"
        kept = tfrecord.scan_records(source / name)[0][:EPISODES]
        end = kept[-1].offset + kept[-1].length + 4  # and its checksum
        (out / name).write_bytes((source / name).read_bytes()[:end])
        split |= {"shardLengths": [str(EPISODES)], "numBytes": str(sum(record.length for record in kept))}
    (out / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


def video(source: Path, out: Path) -> None:
    """The first packets, as they are: box.mp4 has B-frames and no presentation times."""
    with av.open(str(source)) as real, av.open(str(out), "w") as file:
        stream = real.streams.video[0]
        copy = file.add_stream_from_template(stream, opaque=True)
        for packet in [p for p in real.demux(stream) if p.dts is not None][:FRAMES]:
            packet.stream = copy
            file.mux(packet)


def main(originals: Path) -> None:
    libero(originals / LIBERO, HERE / LIBERO)
    bridge(originals / BRIDGE, HERE / BRIDGE)
    shutil.copytree(originals / "lerobot_v3_libero", HERE / "lerobot_v3_libero", copy_function=shutil.copyfile)
    (HERE / "human_video").mkdir()
    for name in ("box.mp4", "cup.mp4"):
        video(originals / "human_video" / name, HERE / "human_video" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
