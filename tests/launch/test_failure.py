"""Who is to blame: found in the logs as ranks, launchers and Slurm really write them."""

from __future__ import annotations

import traceback

import pytest

from stamo_dist.launch.logs import first_error
from stamo_dist.launch.record import main_log, rank_log


def crash(rank: int, second: int, error: Exception) -> str:
    """What a rank prints at its end, with the real traceback of `error`, raised while another was handled."""
    error.__context__ = KeyError("no")
    try:
        raise error
    except Exception as e:
        text = "".join(traceback.format_exception(e))
    return f"rank {rank} of 4 failed at 2026-01-01T00:00:{second:02d}.000+00:00:\n{text}"


@pytest.fixture
def logs(tmp_path):
    def write(*texts: str) -> str:
        for rank, text in enumerate(texts):
            rank_log(tmp_path, rank).parent.mkdir(exist_ok=True)
            rank_log(tmp_path, rank).write_text(text)
        return first_error(tmp_path)

    return write


def test_the_first_rank_counts_not_those_that_lost_it(logs):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.7]:4711")
    assert logs(
        crash(0, 1, lost), crash(1, 9, ValueError("broken shard 17")), crash(2, 8, OSError("disk on fire"))
    ) == ("rank 2: OSError: disk on fire")
    assert logs(crash(0, 3, lost), crash(1, 2, lost), "").startswith("rank 1: RuntimeError: [gloo/")


def test_only_the_last_start_counts(logs):
    again = "--- start 2 of job 7 on n1\nstep 3/20\n"
    assert logs(crash(0, 1, ValueError("long ago")) + again, "") == ""


@pytest.mark.parametrize(
    "line",
    [
        "srun: error: n2: task 3: Killed",
        "srun: error: n2: tasks 2-3: Segmentation fault (core dumped)",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
        "rank 1 of 4 failed with code 137; see run/logs/rank_00001.log",
    ],
)
def test_a_killed_rank_has_no_last_word(logs, line):
    lost = RuntimeError("Connection reset by peer")
    noise = "srun: error: n1: task 0: Exited with exit code 1\n"
    assert logs(f"step 3/20\n{noise}{line}\n" + crash(0, 4, lost), crash(1, 4, lost)) == line


def test_what_all_ranks_refuse_is_said_once(logs):
    refused = "rank 1 of 2 failed at 2026-01-01T00:00:01.000+00:00:\nerror: data.sources.a: no such folder\n"
    assert logs("error: data.sources.a: no such folder\n", refused) == "data.sources.a: no such folder"
    assert logs("", refused) == "rank 1: data.sources.a: no such folder"


def test_no_logs(tmp_path):
    assert first_error(tmp_path) == ""
    assert not main_log(tmp_path).exists()


def test_of_a_list_of_problems_the_first(logs):
    assert logs("error: 2 problems in the recipe:\n  - r.yaml:3: train: no\n  - r.yaml:4: data: no\n") == (
        "r.yaml:3: train: no"
    )
