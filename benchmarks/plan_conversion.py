"""What it costs to plan the conversion of one episode of a large set: seconds, bytes read, files opened.

    python benchmarks/plan_conversion.py [--episodes 1000] [--gigabytes 100]

The sets are made here, of real files blown up with holes: an MP4 gets a `free` box, HDF5 datasets that were never
written. Only who reads too much reads a hole. Every plan is made in a process of its own, beside listing the files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

_MEASURED = """
import os, sys, time
from pathlib import Path
from data_tools.convert.plan import Settings, make_plan
from data_tools.formats.registry import open_reader, parse_options
format, src = sys.argv[1], Path(sys.argv[2])
open_reader(format, src, {})  # imports are not the set's fault
def read(): return int(next(l for l in open("/proc/self/io") if l.startswith("rchar")).split()[1])
before, began, cpu = read(), time.perf_counter(), time.process_time()
plan = make_plan(format, src, "x", Settings(val_fraction=0, episodes=(5, 6), quiet=True))
assert len(plan.episodes) == 1, plan.episodes
print(time.perf_counter() - began, time.process_time() - cpu, read() - before)
began = time.perf_counter()
sum(os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(src) for name in names)
print(time.perf_counter() - began)
"""


def video(root: Path, episodes: int, hole: int) -> str:
    from films import film, picture

    film(root / "one.mp4", [picture(t) for t in range(12)], rate=10)
    for e in range(episodes):
        _grown(root / "one.mp4", root / f"clips/{e:06d}.mp4", hole)
    (root / "one.mp4").unlink()
    return "video"


def lerobot(root: Path, episodes: int, hole: int) -> str:
    from test_lerobot import small

    small(root, lengths=(12,))
    film = root / "videos/chunk-000/observation.image/episode_000000.mp4"
    kept = film.read_bytes()
    rows = (root / "data/chunk-000/episode_000000.parquet").read_bytes()
    for e in range(episodes):
        film.write_bytes(kept)
        _grown(film, film.with_name(f"episode_{e:06d}.mp4.new"), hole)
        os.replace(film.with_name(f"episode_{e:06d}.mp4.new"), film.with_name(f"episode_{e:06d}.mp4"))
        _rows(rows, root / f"data/chunk-000/episode_{e:06d}.parquet", e)
    lines = [json.dumps({"episode_index": e, "tasks": [0], "length": 12}) for e in range(episodes)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    return "lerobot"


def robomimic(root: Path, episodes: int, hole: int) -> str:
    for first in range(0, episodes, 50):
        with h5py.File(root / f"part_{first:05d}.hdf5", "w") as file:
            file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            for e in range(first, min(first + 50, episodes)):
                demo = file.create_group(f"data/demo_{e}")
                demo.attrs["num_samples"] = 12
                demo["actions"] = np.zeros((12, 7), np.float32)
                demo.create_dataset("obs/agentview_image", (12, 64, 64, 3), "u1", chunks=(1, 64, 64, 3))
                demo["obs/robot0_eef_pos"] = np.zeros((12, 3), np.float32)
        _padded(root / f"part_{first:05d}.hdf5", 50 * hole)
    return "robomimic"


def _grown(source: Path, target: Path, hole: int) -> None:
    """A copy whose last box is free space that was never written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(struct.pack(">I4sQ", 1, b"free", hole))
        file.truncate(size + hole)


def _padded(path: Path, size: int) -> None:
    os.truncate(path, max(size, path.stat().st_size))


def _rows(rows: bytes, target: Path, episode: int) -> None:
    table = pq.read_table(io.BytesIO(rows))
    at = table.column_names.index("episode_index")
    pq.write_table(table.set_column(at, "episode_index", pa.array([episode] * len(table))), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--gigabytes", type=float, default=100.0)
    args = parser.parse_args()
    kinds: tuple[Callable[[Path, int, int], str], ...] = (video, lerobot, robomimic)
    print(
        "| set | files | apparent GB | seconds to plan | of a core | to list | MB read |\n|---|---|---|---|---|---|---|"
    )
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / kind.__name__
            root.mkdir()
            format = kind(root, args.episodes, int(args.gigabytes * 1e9 / args.episodes))
            files = [p for p in root.rglob("*") if p.is_file()]
            said = subprocess.run(
                [sys.executable, "-c", _MEASURED, format, str(root)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if said.returncode:
                raise SystemExit(said.stderr)
            seconds, cpu, read, listing = map(float, said.stdout.split())
            size = sum(p.stat().st_size for p in files) / 1e9
            cells = (f"{size:.1f}", f"{seconds:.2f}", f"{cpu:.2f}", f"{listing:.3f}", f"{read / 1e6:.1f}")
            print(f"| {kind.__name__} | {len(files)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
