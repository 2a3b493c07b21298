"""The cache of a node: within its limit, nothing mapped that was removed, nothing left of killed fetches."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest
from filelock import FileLock
from made import make_data, write_source

from stamo_dist.data import fetch
from stamo_dist.data.cache import Cache, fetch_lock, hold
from stamo_dist.data.loader import Cursor, Loader, Sharing, build_loader, cache_use
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import MappedShard
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig
from stamo_dist.recipe.sampling import Shuffle

SHARDS = 60


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 60 shards that are unpacked in the cache, as what is fetched over a network is."""
    folder = tmp_path_factory.mktemp("packed") / "s"
    return write_source(folder, lengths=(14,) * SHARDS, compression="zstd", hashes=["sha1"])


def mixture(packed: Path, cache: Path, shards: float | None = None, batch: int = 8, lanes: int = 8) -> Mixture:
    """`shards`: room in the cache. The order keeps about `lanes` shards open at once."""
    size = max(shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in entries(packed))
    data = make_data(
        {"s": SourceConfig(path=str(packed))}, cache=str(cache), shuffle=Shuffle(lanes=lanes),
        cache_limit=None if shards is None else shards * size / 1e9, fetch_ahead=4,
    )  # fmt: skip
    return Mixture(data, seed=0, global_batch=batch)


def entries(packed: Path) -> list[dict[str, dict[str, int]]]:
    index = json.loads((packed / "train" / "front" / "index.json").read_text())
    return list(index["shards"])


def mapped(pid: int, cache: Path) -> list[str]:
    """The shards that a process maps; those that were removed end in " (deleted)"."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [line.split(maxsplit=5)[5] for line in lines if str(cache) in line and ".mds" in line]


def on_disk(cache: Path) -> int:
    """Bytes of all shards, also those that are being fetched, at a moment when none is removed and no fetch begins."""
    if not cache.exists():
        return 0
    sizes: dict[int, int] = {}
    with FileLock(cache / ".trim.lock"):
        for folder, _, names in os.walk(cache):
            for name in names:
                with suppress(FileNotFoundError):
                    if ".mds" in name and not name.endswith(".lock"):
                        info = os.stat(os.path.join(folder, name))
                        sizes[info.st_ino] = info.st_size
    return sum(sizes.values())


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` all the time; what it raises is raised at the end."""
    over, problems = threading.Event(), list[BaseException]()

    def watch() -> None:
        while not over.is_set() and not problems:
            try:
                look()
            except BaseException as e:
                problems.append(e)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if problems:
        raise problems[0]


FETCH = """
import random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_cache import fetch_at_random, mixture
fetch_at_random(mixture(Path(sys.argv[1]), Path(sys.argv[2]), shards=20), seed=int(sys.argv[3]))
"""


def fetch_at_random(found: Mixture, seed: int, times: int = 250) -> None:
    """Eight threads fetch shards, map them, read them, and let go."""

    def fetch(number: int) -> None:
        with closing(found.views[0].hold(number, must=True) or open(os.devnull)):
            shard = MappedShard(found.shards[number], cached=True)
            assert shard.sample(3, ["t"])["t"] == 3
            assert os.path.exists(shard.spec.path)

    order = random.Random(seed).choices(range(SHARDS), k=times)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fetch, order))


def test_two_processes_of_eight_fetching_threads_stay_within_the_limit(packed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = mixture(packed, cache, shards=20)
    limit, most = found.cache.limit, [0]
    assert limit is not None

    def look() -> None:
        most[0] = max(most[0], on_disk(cache))

    paths = [str(Path(__file__).parent)]
    with watching(look):
        other = subprocess.Popen([sys.executable, "-c", FETCH, str(packed), str(cache), "1", *paths])
        fetch_at_random(found, seed=2)
        assert other.wait(120) == 0
    assert limit / 2 < most[0] <= limit
    assert not list(cache.rglob(".fetch-*"))


READ = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_cache import batches, mixture
rank = int(sys.argv[3])
found = mixture(Path(sys.argv[1]), Path(sys.argv[2]), shards=26, batch=8)
for batch in batches(found, rank, 2):
    print(batch, flush=True)
    input()  # the ranks of a training keep step
"""


def loader(found: Mixture, rank: int = 0, world: int = 1, workers: int = 2) -> Loader:
    return build_loader(
        found,
        rank=rank,
        world_size=world,
        cursor=Cursor(),
        workers=workers,
        sharing=Sharing(node=range(world)),
    )


def batches(found: Mixture, rank: int, world: int, n: int = 250) -> Iterator[list[int]]:
    with closing(loader(found, rank, world)) as opened:
        for batch in islice(opened, n):
            yield [*batch.sample.tolist(), int(batch.images.sum())]


def test_two_trainings_processes_never_map_what_is_removed(packed: Path, tmp_path: Path) -> None:
    """Each with two workers, over two passes and more."""
    cache = tmp_path / "cache"
    limit = mixture(packed, cache, shards=26).cache.limit
    whole = mixture(packed, tmp_path / "whole")
    expected = [list(batches(whole, rank, 2)) for rank in range(2)]
    command = [sys.executable, "-c", READ, str(packed), str(cache)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"said_{rank}").open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    most, maps = [0], [0]

    def look() -> None:
        for rank in ranks:
            children = ""
            with suppress(OSError):  # it has ended
                children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text()
            for pid in map(int, children.split()):
                found = mapped(pid, cache)
                maps[0] = max(maps[0], len(found))
                assert not [path for path in found if path.endswith("(deleted)")]
        most[0] = max(most[0], on_disk(cache))

    with watching(look):
        for step in zip(*expected, strict=True):
            for rank, batch in zip(ranks, step, strict=True):
                assert rank.stdout is not None
                assert json.loads(rank.stdout.readline()) == batch
            for rank in ranks:
                assert rank.stdin is not None
                print(file=rank.stdin, flush=True)
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert limit is not None
    said = "".join((tmp_path / f"said_{rank}").read_text() for rank in range(2))
    assert limit / 2 < most[0] <= limit, said
    assert 0 < maps[0] <= 26


def test_no_more_is_mapped_than_is_needed(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_AHEAD_BATCHES", 4)
    raw = write_source(tmp_path / "raw", lengths=(14,) * SHARDS)
    in_order = make_data({"s": SourceConfig(path=str(raw))}, shuffle=Shuffle(enabled=False), fetch_ahead=4)
    for found in (Mixture(in_order, seed=0, global_batch=8), mixture(packed, tmp_path / "cache", shards=20)):
        with closing(loader(found, workers=0)) as opened:
            for _ in range(200):
                next(opened)
                assert opened._reader is not None
                assert len(opened._reader._shards) <= len(opened._fetcher) <= 20
        assert len(opened._reader._shards)


def test_what_killed_fetches_left_is_counted_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "shard.00000.mds").write_bytes(bytes(100))
    code = (
        "import os, signal, sys; from pathlib import Path; from stamo_dist.data.cache import Cache, fetch_lock\n"
        "path = Path(sys.argv[1])\n"
        "with fetch_lock(path, 0), Cache(path.parents[1], 1000).reserve(path, 400, must=False) as scratch:\n"
        "    (scratch / path.name).write_bytes(bytes(200)); print('there', flush=True); sys.stdin.read()"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "shard.00001.mds")],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert killed.stdout is not None
    assert killed.stdout.readline() == "there\n"

    def room(size: int) -> bool:
        cache, path = Cache(tmp_path, 1000), folder / "shard.00002.mds"
        with fetch_lock(path, 0), cache.reserve(path, size, must=False) as scratch:
            return scratch is not None

    in_use = hold(str(folder / "shard.00000.mds"))
    assert in_use is not None
    assert not room(501), "what is being fetched counts with all that it will take"
    assert room(500)
    killed.kill()
    killed.wait()
    assert room(900)
    assert not list(folder.glob(".fetch-*"))
    old, new = folder / ".fetch-before", folder / ".fetch-now"  # of manifests and the like, which nothing locks
    for left, hours in ((old, 2), (new, 0)):
        left.mkdir()
        (left / "index.json").write_bytes(bytes(50))
        os.utime(left, (time.time() - 3600 * hours,) * 2)
    Cache(tmp_path).trim()
    assert not old.exists()
    assert (tmp_path / ".used").read_text() == "150"
    in_use.close()


def test_a_fetch_that_ends_while_the_cache_is_counted_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, walk = tmp_path / "s" / "shard.00000.mds", os.walk
    path.parent.mkdir()
    with ExitStack() as fetch:
        fetch.enter_context(fetch_lock(path, 0))
        scratch = fetch.enter_context(Cache(tmp_path, 1000).reserve(path, 400, must=False))
        assert scratch is not None
        (scratch / path.name).write_bytes(bytes(300))

        def walks(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
            for seen in walk(root):
                if scratch.name in seen[1]:
                    (scratch / path.name).rename(path)
                    fetch.close()
                yield seen

        monkeypatch.setattr(os, "walk", walks)
        Cache(tmp_path, 1000).trim()
    assert not scratch.exists()
    assert (tmp_path / ".used").read_text() == "300"


def test_folders_may_vanish_while_the_cache_is_counted(tmp_path: Path) -> None:
    """As those of other fetches do."""
    cache, over = Cache(tmp_path, 1000), threading.Event()

    def come_and_go(i: int) -> None:
        folder = tmp_path / f"s{i}" / ".fetch-x"
        while not over.is_set():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "shard.00000.mds").write_bytes(bytes(10))
            shutil.rmtree(folder.parent)

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(come_and_go, i) for i in range(8)]
        for _ in range(100):
            cache.trim()
        over.set()
        for each in running:
            each.result()


def test_the_need_is_said_and_a_cache_too_small_for_a_batch_is_refused(packed: Path, tmp_path: Path) -> None:
    def use(found: Mixture, node: range = range(2)) -> fetch.CacheUse:
        needed = cache_use(found, world_size=4, node=node, cursor=Cursor())
        assert needed is not None
        return needed

    found = mixture(packed, tmp_path, shards=2, batch=64, lanes=24)
    needed = use(found)
    with pytest.raises(DataError) as caught:
        needed.check(found.cache)
    told = re.fullmatch(
        r"data\.cache_limit: (\S+) GB, but the shards of one batch take (\S+) GB on each node; set (\S+) or more, "
        r"better (\S+), which the (\d+) shards in use at once and those to come need",
        str(caught.value),
    )
    assert told is not None
    given, batch, least, better, shards = map(float, told.groups())
    assert given < batch <= least < better
    assert 12 <= shards < SHARDS / 2, "half of 24 lanes, and what they begin meanwhile: less than half of all"
    assert use(mixture(packed, tmp_path, batch=64)).shards < shards
    assert least * 1e9 >= needed.batch
    assert use(found, range(4)).batch >= needed.batch >= use(found, range(1)).batch
    enough = mixture(packed, tmp_path, shards=SHARDS, batch=64, lanes=24)
    use(enough).check(enough.cache)
    assert re.fullmatch(
        r"cache: \d+ shards in use at once, and those to come, need \S+ GB on each node, "
        rf"data\.cache_limit gives \S+ in {tmp_path}",
        use(enough).line(enough.cache),
    )
    assert f"set {told[4]}" in needed.line(found.cache)
    assert "without data.cache_limit all" in needed.line(mixture(packed, tmp_path).cache)
    local = write_source(tmp_path / "local")
    here = Mixture(make_data({"s": SourceConfig(path=str(local))}), seed=0, global_batch=8)
    assert cache_use(here, world_size=1, node=range(1), cursor=Cursor()) is None
