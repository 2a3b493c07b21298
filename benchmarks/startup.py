"""What a rank's start costs with many shards: CPU, memory, file operations; a node's first rank and the others.

python benchmarks/startup.py [--samples 1e9] [--sources 50] [--against CHECKOUT] [--folder /tmp]

Writes manifests, indexes and empty files in place of the shards (nothing reads one), then starts ranks of one node in
fresh processes: they open the mixture, compute its fingerprints, place the run in the middle of the data and plan the
first batches there. Figures are above those after the imports; a loader worker's memory is all it has. File operations
are counted by strace in a second pass: calls that name a path, and reads of folders. `--against` measures the same with
another checkout's package.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHARD, BATCH, SIZE = 4096, 4096, 224
COLUMNS = {
    "action": "ndarray:float32:7", "camera": "str", "convention": "str", "episode": "str", "image": "bytes",
    "instruction": "str", "length": "int", "proprio": "ndarray:float32:8", "source": "str", "t": "int",
    "time": "float64",
}  # fmt: skip
SIZES = [28, None, None, None, None, None, 8, 32, None, 8, 8]
BEGIN, END = "/startup-begins", "/startup-ends"  # looked for, so that strace shows when


def rank_start(root: Path, rank: int, ranks: int, world: int) -> None:
    """One rank of a node of the package on the path, as a process of its own: prints what it took."""
    from stamo_dist.checkpoint.compatibility import run_fingerprint
    from stamo_dist.data.loader import Cursor, build_loader, cache_use
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.recipe.schema import Recipe

    paths = {f"source{i:02}": {"path": f"{root}/source{i:02}"} for i in range(len(os.listdir(root)))}
    train = {"global_batch": BATCH, "steps": 10**6}
    raw = {"name": "startup", "run_dir": "/none", "train": train, "data": {"image_size": SIZE, "sources": paths}}
    recipe = Recipe.model_validate(raw)
    gc.freeze()  # as `stamo train` does
    os.path.exists(BEGIN)
    options: dict[str, Any] = {}
    if "node" in inspect.signature(Mixture).parameters:
        from stamo_dist.data.node import NodeShare

        options["node"] = NodeShare("startup", range(ranks), rank)
    before, began, parts = memory("VmRSS"), time.perf_counter(), [time.process_time()]
    mixture = Mixture(recipe.data, seed=0, global_batch=BATCH, **options)
    parts.append(time.process_time())
    cache_use(mixture, world_size=world, node=range(ranks), cursor=Cursor())
    run_fingerprint(recipe, mixture)
    parts.append(time.process_time())
    slots = np.concatenate([mixture.order.share(r, world) for r in range(8)])  # those of a node
    mixture.plan(mixture.num_samples // BATCH // 2, mixture.order.at_a_time(len(slots)), slots)
    parts.append(time.process_time())
    wall = time.perf_counter() - began
    if options:
        options["node"].close()
    os.path.exists(END)
    sizes = [memory(what) - before for what in ("VmHWM", "VmRSS")]
    loader = build_loader(mixture, rank=rank, world_size=world, cursor=Cursor(), workers=1)
    time.sleep(5)  # the worker has what it needs to know
    worker = memory("VmRSS", loader._pool._workers[0].pid)
    loader.close()
    cpu = [b - a for a, b in pairwise(parts)]
    print(json.dumps({"figures": [sum(cpu), *cpu, wall, *sizes, worker], "fingerprint": mixture.fingerprint}))


def memory(what: str, process: int | str = "self") -> float:
    """MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(what))


def write(root: Path, samples: int, sources: int) -> int:
    """The files of so many samples; returns how many shards they have."""
    shards = -(-samples // SHARD // sources)
    for i in track(range(sources), "writing sources", console=Console(stderr=True)):
        source = root / f"source{i:02}"
        folder = source / "train" / "front"
        folder.mkdir(parents=True)
        entries, checksums = [], {}
        for n in range(shards):
            name, digest = f"shard.{n:05}.mds", sha256(f"{i} {n}".encode()).hexdigest()
            size = 64_000_000 + 1000 * n
            with (folder / name).open("wb") as file:
                file.truncate(size)  # which takes no room
            checksums[f"train/front/{name}"] = digest
            entries.append({
                "column_encodings": list(COLUMNS.values()), "column_names": list(COLUMNS), "column_sizes": SIZES,
                "compression": None, "format": "mds", "hashes": ["sha256"],
                "raw_data": {"basename": name, "bytes": size, "hashes": {"sha256": digest}}, "samples": SHARD,
                "size_limit": None, "version": 2, "zip_data": None,
            })  # fmt: skip
        (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}, sort_keys=True))
        frames = shards * SHARD
        manifest = {
            "name": source.name, "source_format": "made here", "image_size": SIZE, "cameras": ["front"],
            "splits": {"train": {"episodes": frames // 128, "frames": frames}}, "rate_hz": 10, "action_dim": 7,
            "format_version": 2, "proprio_dim": 8, "convention": "made here", "checksums": checksums,
        }  # fmt: skip
        (source / "manifest.json").write_text(json.dumps(manifest))
    return shards * sources


def start(checkout: Path, root: Path, ranks: int, world: int, trace: Path | None) -> list[dict[str, Any]]:
    """What each rank of a node measured; with `trace`, how many operations each did."""
    processes = []
    for rank in range(ranks):
        command = [sys.executable, __file__, "--rank", str(rank), "--ranks", str(ranks), "--world", str(world)]
        command += ["--folder", str(root)]
        if trace:
            command = ["strace", "-f", "-qq", "-e", "trace=%file,getdents64", "-o", f"{trace}.{rank}", *command]
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    for rank, result in enumerate(found if trace else []):
        result["operations"] = operations(Path(f"{trace}.{rank}"))
    return found


def operations(trace: Path) -> int:
    """Calls between the marks that name a path, and reads of folders; none for imports, nor in the node's memory."""
    count, inside = 0, False
    other = (sys.prefix, sys.base_prefix, "/proc", "/dev", f"{tempfile.gettempdir()}/stamo-start-")
    with trace.open() as lines:
        for line in lines:
            if BEGIN in line or END in line:
                inside = BEGIN in line
            elif inside and not any(f'"{path}' in line for path in other) and '"", {' not in line:
                count += ".py" not in line
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2, help="Of the node that are started.")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="Its root.")
    parser.add_argument("--folder", type=Path, help="Where to write; kept, and used again, when given.")
    options = parser.parse_args()
    if options.rank is not None:
        return rank_start(options.folder, options.rank, options.ranks, options.world)
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="stamo-benchmark-") as temporary:
        root = (options.folder or Path(temporary)).resolve() / "sources"
        if not root.exists():
            write(root, int(options.samples), options.sources)
        table = Table(title=f"{options.samples:.3g} samples, {options.sources} sources, {options.world} ranks")
        figures = ("CPU s", "mixture", "run fingerprint", "place, plan", "wall s", "peak MB", "kept MB", "worker MB")
        for column in ("", *figures, "operations"):
            table.add_column(column, justify="right" if column else "left")
        prints = set()
        for name, checkout in {"here": here, **({"against": options.against} if options.against else {})}.items():
            runs = [start(checkout, root, options.ranks, options.world, None) for _ in range(options.repeats)]
            traced = start(checkout, root, options.ranks, options.world, Path(temporary) / "trace")
            for rank in sorted({0, options.ranks - 1}):
                mine = [run[rank] for run in runs]
                prints |= {one["fingerprint"] for one in mine}
                medians = map(statistics.median, zip(*(one["figures"] for one in mine), strict=True))
                shown = [f"{value:.2f}" if i < 5 else f"{value:.0f}" for i, value in enumerate(medians)]
                who = f"{name}, {'another rank' if rank else 'first of the node'}"
                table.add_row(who, *shown, f"{traced[rank]['operations']:,}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print("the order is the same" if len(prints) == 1 else f"the orders differ: {prints}")


if __name__ == "__main__":
    main()
