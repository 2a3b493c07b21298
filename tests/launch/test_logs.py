"""Logs that are read while they grow."""

from __future__ import annotations

import pytest

from stamo_dist.errors import RunError
from stamo_dist.launch import logs
from stamo_dist.launch.logs import JobLog, choose, follow
from stamo_dist.launch.record import rank_log


@pytest.fixture
def run(tmp_path):
    for rank, node in ((0, "n1"), (3, "n2")):
        log = rank_log(tmp_path, rank)
        log.parent.mkdir(exist_ok=True)
        log.write_text(
            f"--- start 1 of job 7: rank {rank} of 4 @ {node}, then\n" + "".join(f"line {i}\n" for i in range(9))
        )
    return tmp_path


def test_the_end_of_a_log_of_any_length(tmp_path):
    lines = [f"{i} " + "é" * (i % 50) for i in range(20_000)]
    (tmp_path / "log").write_text("\n".join(lines) + "\ncut o")
    log = JobLog(tmp_path / "log")
    for count in (1, 100, 19_999, 0):
        assert log.last(count) == lines[-count:]
    assert log.more() == []
    with log.path.open("a") as f:
        f.write("ff\nnext")
    assert log.more() == ["cut off"]
    assert log.end() == ["next"]


def test_follows_over_a_replaced_file_and_ends_with_the_run(run):
    log = choose(run, "3")[0]
    assert log.last(2) == ["line 7", "line 8"]
    over = [False, False, True, True]
    lines = []

    def ended() -> bool:
        if len(over) == 4:
            with log.path.open("a") as f:
                f.write("added\n")
        elif len(over) == 3:
            log.path.unlink()
            log.path.write_text("new file\nno line end")
        return over.pop(0)

    lines += follow([log], ended)
    assert lines == ["added", "new file", "no line end"]


def test_follows_over_a_start_on_other_nodes_with_more_ranks(run, monkeypatch):
    monkeypatch.setattr(logs, "_LOOK", 0)
    chosen, times = choose(run, "all"), [0]
    assert len([line for log in chosen for line in log.last(0)]) == 20

    def ended() -> bool:
        times[0] += 1
        if times[0] == 2:
            for rank, node in ((3, "n7"), (5, "n8")):
                with rank_log(run, rank).open("a") as f:
                    f.write(f"--- start 2 of job 7: rank {rank} of 8 @ {node}, later\nstep 1\n")
        return times[0] > 2

    assert list(follow(chosen, ended, lambda: choose(run, "all"))) == [
        "rank 3 @ n7 | --- start 2 of job 7: rank 3 of 8 @ n7, later",
        "rank 3 @ n7 | step 1",
        "rank 5 @ n8 | --- start 2 of job 7: rank 5 of 8 @ n8, later",
        "rank 5 @ n8 | step 1",
    ]


def test_whose_lines(run):
    shown = [line for log in choose(run, "all") for line in log.last(1)]
    assert shown == ["rank 0 @ n1 | line 8", "rank 3 @ n2 | line 8"]
    assert choose(run, None)[0].last(1) == ["line 8"]
    with pytest.raises(RunError, match="logs of the ranks 0, 3; or give all"):
        choose(run, "1")
    with pytest.raises(RunError, match="no logs yet"):
        choose(run / "elsewhere", None)
