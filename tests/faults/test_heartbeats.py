"""One file a node says how far its ranks are, whoever of them still does; stopped ranks and nodes are named."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stamo_dist.distributed.rank import World
from stamo_dist.faults import heartbeats, watchdog
from stamo_dist.faults.heartbeats import Heartbeat, Heartbeats, heartbeat_of_main
from stamo_dist.faults.watchdog import Watchdog, diagnosis
from stamo_dist.recipe.training import Train

NODES, EACH, SILENT = 3, 4, 10.0


class Cluster:
    """Ranks 0 to 11 on three nodes, each with a memory of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "watch_1"):
        self.now = 1000.0
        monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))
        self.shared = folder / "logs" / name
        self.shared.mkdir(parents=True)
        self.memory = [folder / f"memory{node}" for node in range(NODES)]
        self.ranks: list[Heartbeats] = []
        for rank in range(NODES * EACH):
            memory = self.memory[rank // EACH]
            memory.mkdir(exist_ok=True)
            monkeypatch.setattr(heartbeats, "_memory", lambda memory=memory: memory)
            self.ranks.append(Heartbeats(self.shared, rank, SILENT))
        self.beat()
        for rank in self.ranks:
            rank.meet()
        assert self.files() == [], "they have not met yet"
        self.beat()

    def beat(self, *but: int, step: int = 0, dumped: bool = False) -> None:
        """Twice: a node's lowest rank passes on what the others left before."""
        for number, rank in [*enumerate(self.ranks)] * 2:
            if number not in but:
                rank.beat(Heartbeat(number, marks=step, step=step, dumped=dumped))

    def files(self) -> list[str]:
        return sorted(os.listdir(self.shared))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_one_file_a_node(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.files() == ["node_00000.json", "node_00004.json", "node_00008.json"]
    before = {name: (cluster.shared / name).stat().st_ino for name in cluster.files()}
    for number in (1, 2, 3, 5, 11):
        cluster.ranks[number].beat(Heartbeat(number, step=7))
    assert {name: (cluster.shared / name).stat().st_ino for name in cluster.files()} == before, "only the lowest writes"
    cluster.beat(step=8)
    assert all(rank.read() == {n: Heartbeat(n, 8, 8) for n in range(12)} for rank in cluster.ranks)
    assert heartbeat_of_main(tmp_path / "logs") == Heartbeat(0, 8, 8)
    assert heartbeat_of_main(tmp_path) is None


def test_who_is_stopped_is_replaced(cluster: Cluster) -> None:
    """Rank 4, which writes for its node, and 6 are stopped; 5 takes over, under the node's name."""
    cluster.now += 2 * SILENT
    cluster.beat(4, 6, step=3)
    found = cluster.ranks[0].read()
    assert {n: beat.step for n, beat in found.items()} == {n: 0 if n in (4, 6) else 3 for n in range(12)}
    assert cluster.files() == ["node_00000.json", "node_00004.json", "node_00008.json"]


def test_what_one_says_reaches_all_and_the_lowest_answers(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 7 is late; 0 and the node of 8 to 11 are stopped."""
    stopped = (0, 8, 9, 10, 11)
    cluster.now += 2 * SILENT
    cluster.ranks[7].say_hung(5.0, "train.step_timeout")
    cluster.ranks[3].say_hung(6.0, "train.save_timeout")
    cluster.beat(*stopped, step=2)
    assert [rank.hung for rank in cluster.ranks] == [True] * 8 + [False] * 4
    cluster.beat(*stopped, step=2, dumped=True)
    assert [n for n, rank in enumerate(cluster.ranks) if n not in stopped and rank.speaks()] == [1]
    said = diagnosis(cluster.ranks[1].read(), 12, *cluster.ranks[1].limit(), tmp_path)
    assert "no progress for 5 s (train.step_timeout): ranks 0, 8, 9, 10, 11 no longer answer (stopped" in said
    opened = list[str]()
    monkeypatch.setattr(heartbeats, "_beats", lambda file: opened.append(file.name) or [])
    assert not any(cluster.ranks[n].speaks() for n in (2, 3, 5, 6, 7))
    assert opened == [], "who does not speak for its node asks no other"


def test_a_node_whose_lowest_ranks_are_stopped_defers_to_the_node_before(cluster: Cluster) -> None:
    cluster.ranks[9].say_hung(5.0, "train.step_timeout")
    cluster.beat(0, 1, 2, 3, step=2, dumped=True)
    assert [n for n in range(4, 12) if cluster.ranks[n].speaks()] == [4]


def test_a_memory_that_is_cleared_and_one_that_is_full(cluster: Cluster) -> None:
    shutil.rmtree(next(cluster.memory[1].iterdir()))
    cluster.beat(step=4)
    assert {beat.step for beat in cluster.ranks[0].read().values()} == {4}
    shutil.rmtree(cluster.shared)  # as a newer start does
    with pytest.raises(FileNotFoundError):
        cluster.ranks[0].beat(Heartbeat(0, 5))
    assert not cluster.shared.exists()


def test_nothing_is_left(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = {folder for memory in cluster.memory for folder in memory.iterdir()}
    foreign, old = cluster.memory[0] / "stamo-watch-0-another-run", cluster.memory[0] / f"stamo-watch-{os.getuid()}-old"
    for folder in (foreign, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    again = Cluster(tmp_path, monkeypatch, "watch_2")  # of the same run, on the same nodes
    assert not any(folder.exists() for folder in (*killed, old))
    assert foreign.exists()
    foreign.rmdir()
    for rank in again.ranks[::-1]:
        assert again.shared.exists()
        rank.close()
    assert not again.shared.exists()
    assert not any(os.listdir(memory) for memory in again.memory)


def test_a_damaged_file_hides_only_its_node(cluster: Cluster) -> None:
    (cluster.shared / "node_00008.json").write_text("[{")
    assert sorted(cluster.ranks[0].read()) == list(range(8))
    (cluster.shared / "hung").write_text(json.dumps(5))
    assert cluster.ranks[0].limit() == (0.0, "train.step_timeout")


def test_who_leaves_a_hung_run_takes_away_what_is_its_own(cluster: Cluster) -> None:
    cluster.now += 2 * SILENT  # rank 2 is stopped
    cluster.beat(2, dumped=True)
    for number in (0, 1, 3):
        assert sorted(cluster.ranks[3].read()) == list(range(12))
        cluster.ranks[number].leave(Heartbeat(number, dumped=True))
    assert not any(cluster.memory[0].iterdir())
    assert any(cluster.memory[1].iterdir())
    assert [n for n in range(12) if cluster.ranks[4].read()[n].dumped] == [0, 1, *range(3, 12)]


def test_a_suspended_job_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for which a process was stopped is none in which it got no further."""
    now, left = [0.0], threading.Event()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Watchdog, "_leave_alone", lambda *_: left.set())
    limits = Train.model_validate({"steps": 1, "global_batch": 1, "setup_timeout": 1})
    watching = Watchdog(tmp_path, World(0, 1, 0, 1), limits)
    now[0] += 3600
    assert not left.wait(0.3)
    for _ in range(200):
        now[0] += 0.05
        if left.wait(0.02):
            break
    watching.close()
    assert left.is_set(), "it hangs"
