"""How long a step waits for its data when the shards lie in an object store, beside the limit of 2 %.

python benchmarks/object_store.py [--latency 0.1] [--rate 50] [--shards 40] [--shard-mb 16] [--cache-shards 25]

A real S3 server (moto) stands behind a line that waits `--latency` seconds before each answer and passes `--rate` MB/s
on a connection. The training is a clock: it takes a batch, and then `--step` seconds, at the pace of one of eight GPUs
on a node that reads 4,096 frames of 16 kB a second. The first step waits for the first shards whatever is done; it is
named apart. What a step waits for the same shards on local disk is measured first: on a busy machine it is not nothing.
`--ahead` bounds how many batches are looked ahead, to see what that is worth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import boto3
import numpy as np
import simplejpeg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from s3 import far_line, free_port, server  # noqa: E402

from stamo_dist import _streaming  # noqa: E402, F401  # isort: skip  must precede streaming
from streaming.base.format import MDSWriter  # noqa: E402

from stamo_dist.data import fetch  # noqa: E402
from stamo_dist.data.loader import Cursor, build_loader, cache_use  # noqa: E402
from stamo_dist.data.mixture import Mixture  # noqa: E402
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Split, columns  # noqa: E402
from stamo_dist.recipe.data import Data, SourceConfig  # noqa: E402
from stamo_dist.recipe.sampling import Shuffle  # noqa: E402

LIMIT = 0.02
SIZE = 84
LENGTH = 64  # frames of an episode


def write(folder: Path, shards: int, shard_bytes: int) -> None:
    """A source of noise: frames of about 16 kB."""
    noise = np.random.default_rng(0)
    images = [
        simplejpeg.encode_jpeg(noise.integers(0, 256, (SIZE, SIZE, 3), np.uint8), 94, colorsubsampling="444")
        for _ in range(32)
    ]
    episodes = max(1, shard_bytes // (LENGTH * len(images[0])))
    lines, start, layout = [], 0, columns(action=0, original_action=0, proprio=0)
    with MDSWriter(out=str(folder / "train" / "front"), columns=layout, size_limit=None, hashes=["xxh64"]) as writer:
        for shard in range(shards):
            for e in range(episodes):
                name = f"{shard}-{e}"
                lines.append(Episode(id=name, start=start, length=LENGTH).model_dump_json())
                start += LENGTH
                for t in range(LENGTH):
                    about = {"episode": name, "t": t, "length": LENGTH, "time": t / 10, "instruction": ""}
                    where = {"source": "s", "camera": "front", "convention": ""}
                    writer.write({"image": images[(shard + e + t) % 32], **about, **where})
            writer.flush_shard()
            writer._reset_cache()
    (folder / "train" / EPISODES).write_text("\n".join(lines) + "\n")
    manifest = Manifest(
        name="s", source_format="noise", image_size=SIZE, cameras=["front"], rate_hz=10,
        splits={"train": Split(episodes=len(lines), frames=start)}, action_dim=0, proprio_dim=0, convention="",
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def upload(url: str, folder: Path) -> None:
    store = boto3.client("s3", endpoint_url=url)
    store.create_bucket(Bucket="robots")
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), "robots", f"s/{path.relative_to(folder)}")


@contextmanager
def measured(cache: Path) -> Iterator[list[int]]:
    """The most that lay in the cache."""
    over, most = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.1):
            total = 0
            for folder, _, names in os.walk(cache):
                for name in names:
                    try:
                        total += os.stat(os.path.join(folder, name)).st_size if ".mds" in name else 0
                    except FileNotFoundError:
                        continue
            most[0] = max(most[0], total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def train(mixture: Mixture, step: float, steps: int, workers: int) -> list[float]:
    """Seconds that each step waited for its batch."""
    waits = []
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers)
    with closing(loader):
        began = time.perf_counter()
        for _ in islice(loader, steps):
            waits.append(time.perf_counter() - began)
            time.sleep(step)
            began = time.perf_counter()
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.1, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=50, help="MB/s of a connection")
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--shard-mb", type=float, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step", type=float, default=0.25, help="seconds of a step without its data")
    parser.add_argument("--passes", type=float, default=1.2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--open", type=int, default=6, help="shards that are blended at once")
    parser.add_argument("--cache-shards", type=float, default=25, help="room in the cache")
    parser.add_argument("--ahead", type=int, nargs="*", default=[], help="look ahead so many batches at most, too")
    args = parser.parse_args()
    size = int(args.shard_mb * 1e6)
    with tempfile.TemporaryDirectory() as temporary, server(port := free_port()) as near:
        os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        write(folder := Path(temporary) / "source", args.shards, size)
        upload(near, folder)
        run(args, str(folder), Path(temporary) / "none", None)
        for ahead in (None, *args.ahead):
            with far_line(port, args.latency, args.rate * 1e6) as (line, traffic):
                os.environ["S3_ENDPOINT_URL"] = line
                run(args, "s3://robots/s", Path(temporary) / f"cache-{ahead}", ahead)
                while traffic.busy:
                    time.sleep(0.1)
                print(f"  at most {traffic.most_busy} requests at once, {traffic.received / 1e6:,.0f} MB came")


def run(args: argparse.Namespace, path: str, cache: Path, ahead: int | None) -> None:
    if ahead is not None:
        fetch._AHEAD_BATCHES = ahead
    room = args.cache_shards * args.shard_mb * 1.01 / 1e3
    block = int(args.open * args.shard_mb * 1e6 / 16e3)
    data = Data(
        sources={"s": SourceConfig(path=path)}, image_size=SIZE, workers=args.workers, cache=str(cache),
        cache_limit=room, shuffle=Shuffle(block_size=block), fetch_ahead=1 if ahead else 16,
    )  # fmt: skip
    mixture = Mixture(data, seed=0, global_batch=args.batch)
    steps = int(args.passes * mixture.num_samples / args.batch)
    with measured(cache) as most:
        waits = train(mixture, args.step, steps, args.workers)
    bytes_a_second = mixture.shards[0].nbytes / mixture.shards[0].samples * args.batch / args.step
    share = statistics.fmean(waits[1:]) / (statistics.fmean(waits[1:]) + args.step)
    print(
        f"{path}: {len(mixture.shards)} shards of {args.shard_mb:.0f} MB, {steps} steps of {args.batch} in "
        f"{args.step} s ({bytes_a_second / 1e6:.1f} MB/s)\n"
        f"  data wait {share:.2%} of the step, limit {LIMIT:.0%}: {'ok' if share <= LIMIT else 'TOO MUCH'}; longest "
        f"{max(waits[1:]):.2f} s, the first {waits[0]:.2f} s"
    )
    if use := cache_use(mixture, world_size=1, node=range(1), cursor=Cursor()):
        print(
            f"  looking ahead {fetch.batches_ahead(mixture)} batches\n  {use.line(mixture.cache)}\n"
            f"  cache: at most {most[0] / 1e6:,.0f} MB of {room * 1e3:,.0f}"
        )


if __name__ == "__main__":
    main()
