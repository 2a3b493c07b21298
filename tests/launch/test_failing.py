"""Which node a start failed on, and when it is left out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from fake_slurm import FakeJob, FakeSlurm
from rich.console import Console
from test_failure import crash

from stamo_dist.faults.heartbeats import blame, forget_blame, hung_ranks
from stamo_dist.launch import slurm
from stamo_dist.launch.ends import judge_exit
from stamo_dist.launch.failing import HUNG, LostTask, failing, failing_now, find_blame, keep_off
from stamo_dist.launch.record import Event, Launch, main_log, rank_log, record
from stamo_dist.launch.status import collect
from stamo_dist.launch.status_tables import one_run

NODES, NOW = ["n1", "n2", "n3", "n4"], datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered on {}"


def start(*blamed: str, cause: str = ECC, nodes: Sequence[str] = NODES, hours_ago: float = 1) -> list[Event]:
    """A start that failed."""
    when = (NOW - timedelta(hours=hours_ago)).isoformat()
    end = Event("failed", blamed=list(blamed), cause=cause.format(*blamed[:1]), time=when)
    return [Event("started", nodes=list(nodes), time=when), end]


def left_out(*starts: list[Event], hours: float = 12) -> list[str]:
    return list(failing([event for one in starts for event in one], hours, NOW))


def test_a_node_that_failed_twice_is_left_out_until_that_is_forgotten():
    assert left_out(start("n2")) == []
    assert left_out(start("n2"), start("n2", cause="it hung")) == ["n2"], "of whatever kind"
    assert left_out(start("n2"), start("n3"), start("n2"), start("n3"), start("n2")) == ["n2", "n3"]
    assert left_out(start("n2", hours_ago=11), start("n2")) == ["n2"]
    assert left_out(start("n2", hours_ago=13), start("n2")) == []
    assert left_out(start("n2"), start("n2"), hours=0) == []
    assert left_out(start("n2", hours_ago=-3), start("n2", hours_ago=-2)) == ["n2"], "a clock has jumped back"


def test_what_fails_on_every_node_is_the_programs():
    assert left_out(start(*NODES), start(*NODES)) == [], "all ranks"
    assert left_out(*(start("n1", nodes=["n1"]) for _ in range(2))) == ["n1"], "no other one was tried"
    alone = [start(n, nodes=[n]) for n in ("n1", "n1", "n2")]
    assert left_out(*alone) == [], "leaving it out did not help"
    assert left_out(*(start(n) for n in ("n1", "n1", "n2", "n2", "n3", "n3"))) == [], "wherever rank 0 is"


HEAD = "--- start 2 of job 7 on n1,n2\n"
OTHER = "--- start 2 of job 7: rank {} of 4 @ n2, 2026\n"
LOST = RuntimeError("Connection closed by peer [10.0.0.7]:4711")
FIRST = LostTask("n2", 2, "Killed")


@pytest.mark.parametrize(
    ("rank0", "rank2", "lost", "expected"),
    [
        (crash(0, 1, LOST), crash(2, 9, OSError("no disk")), LostTask("n1", 0, "Exited"), (["n2"], "OSError: no disk")),
        (crash(0, 1, LOST), "", FIRST, (["n2"], "Killed")),
        ("", "", LostTask("n2", 3, "Exited with exit code 127"), (["n2"], "Exited with exit code 127")),
        (crash(0, 1, LOST), crash(2, 1, LOST), LostTask("n1", 0, "Exited with exit code 1"), ([], "")),
        (crash(0, 1, ValueError("x")), crash(2, 1, ValueError("x")), FIRST, (["n1", "n2"], "ValueError: x")),
        ("", "", None, ([], "")),
    ],
)
def test_the_node_of_the_rank_that_failed_by_itself(tmp_path: Path, rank0, rank2, lost, expected):
    main_log(tmp_path).parent.mkdir()
    main_log(tmp_path).write_text(HEAD + rank0)
    rank_log(tmp_path, 2).write_text(OTHER.format(2) + rank2)
    before = OTHER.format(3).replace("start 2", "start 1")
    rank_log(tmp_path, 3).write_text(before + crash(3, 0, OSError("of an earlier start")))
    found = find_blame(tmp_path, ["n1", "n2"], 2, ["--- start 2 of job 7"], lost, left=False)
    assert (found.nodes, found.cause) == expected


def test_a_hung_start_blames_the_node_that_its_heartbeats_name(tmp_path: Path):
    logs = tmp_path / "logs"
    logs.mkdir()
    assert find_blame(tmp_path, ["n1", "n2"], 2, [], FIRST, left=True).nodes == [], "it was asked to leave"
    blame(logs, [])
    assert find_blame(tmp_path, ["n1", "n2"], 2, [], None, left=True).nodes == [], "hung, and nobody knows where"
    blame(logs, [3])
    blame(logs, [])  # who does not know says nothing against it
    found = find_blame(tmp_path, ["n1", "n2"], 2, [], None, left=True)
    assert (found.nodes, found.cause) == (["n2"], HUNG)
    forget_blame(logs)
    assert hung_ranks(logs) is None


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(nodes=("n1", "n2"))
    made.jobs["7"] = FakeJob("7", tmp_path, "")
    monkeypatch.setattr(slurm, "_execute", made.execute)
    monkeypatch.setattr(slurm, "tool", lambda name: f"/slurm/{name}")
    return made


def test_no_node_is_left_out_where_too_few_others_are(world: FakeSlurm, tmp_path: Path):
    launch = Launch("toy", str(tmp_path), "", profile={"exclude": "n1"})
    kept, said = keep_off(launch, "7", {"n2": 2}, before=[])
    assert (kept, world.jobs["7"].excluded) == ([], frozenset())
    assert said == (
        "is not kept off n2 (2 starts failed there): too few nodes would be left: "
        "allocation failure: Requested node configuration is not available"
    )
    free = Launch("toy", str(tmp_path), "")
    assert keep_off(free, "7", {"n2": 2}, before=[]) == (["n2"], "stays off n2 (2 starts failed there)")
    assert world.jobs["7"].excluded == {"n2"}
    assert keep_off(launch, "7", {}, before=["n2"]) == ([], "")
    assert world.jobs["7"].excluded == {"n1"}, "the profile's own"
    world.jobs["7"].state = "RUNNING"
    kept, said = keep_off(free, "7", {"n2": 2}, before=[])
    assert (kept, "no longer pending" in said) == ([], True)


def test_starts_on_a_node_that_is_left_out_do_not_count_and_are_said(tmp_path: Path):
    launch = Launch("toy", str(tmp_path), "", command=["train", "x"], job_ids=["7"], max_restarts=2)
    launch.write()
    record(tmp_path, Event("submitted"))
    for i in (1, 2):
        record(tmp_path, Event("started", job="7", nodes=NODES))
        record(tmp_path, Event("failed", job="7", blamed=["n2"], cause=ECC.format("n2")))
        off = ["n2"] if i == 2 else []
        record(tmp_path, Event("requeued", job="7", avoids=off, reason="it ended with code 1"))
    assert failing_now(launch) == {"n2": 2}
    for _ in range(2):
        record(tmp_path, Event("started", job="7", nodes=NODES))
        assert judge_exit(launch, 1, "7", ["n3"]).again
        record(tmp_path, Event("failed", job="7", blamed=["n3"], cause="ValueError"))
        record(tmp_path, Event("requeued", job="7", avoids=["n2"], reason="it ended with code 1"))
    record(tmp_path, Event("started", job="7", nodes=NODES))
    assert not judge_exit(launch, 1, "7", ["n3"]).again
    screen = Console(file=io.StringIO(), width=200)
    screen.print(one_run(collect([tmp_path])[0]))
    assert f"stays off  n2: {ECC.format('n2')}" in screen.file.getvalue()  # type: ignore[attr-defined]
