"""Faults of Slurm jobs: what the deck holds, how each is done, and what an operator's program may say."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from stamo_dist.chaos import job_faults
from stamo_dist.chaos.faults import Deck, Fault
from stamo_dist.chaos.job_faults import ACTS, OFFERS, Nobody, Program, kinds, strike
from stamo_dist.chaos.job_harness import Site
from stamo_dist.cli.chaos import ChaosOptions
from stamo_dist.errors import StamoError
from stamo_dist.launch.slurm import SlurmError, SlurmJob

JOB = SlurmJob("7", "RUNNING", "None", None, "n[1-2]", 2, "0:10", "1:00", "low", "me", "toy")


class Recorder:
    """An operator that notes what it is asked for."""

    def __init__(self, *offers: str):
        self.offers, self.asked = offers, list[tuple[str, str, float, Path]]()

    def act(self, name: str, node: str, seconds: float, run: Path) -> bool:
        self.asked.append((name, node, seconds, run))
        return True


def test_the_deck_holds_what_can_be_done():
    """Without an operator only what a user can do; with one all of it, each kind once before any comes twice."""
    alone, everything = kinds(Nobody()), kinds(Recorder(*OFFERS))
    assert {ACTS[whom, what][0].offer for whom, what, _ in alone} == {None}
    assert {ACTS[whom, what][0].offer for whom, what, _ in everything} == {None, *OFFERS}
    assert set(kinds(Recorder("preempt"))) - set(alone) == {k for k in everything if k[1] == "preempted"}
    deck = Deck(random.Random(3), everything)
    dealt = [deck.deal(hangs=True) for _ in everything]
    assert Counter((f.whom, f.what, f.moment) for f in dealt) == Counter(everything)
    again = Deck(random.Random(3), everything)
    assert [again.deal(hangs=True) for _ in everything] == dealt, "the seed decides"


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, ...]]:
    """The commands that Slurm would get."""
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(job_faults.slurm, "run", lambda *command, **_: given.append(command) or "")
    monkeypatch.setattr(job_faults.time, "sleep", lambda _: None)
    return given


@pytest.mark.parametrize(
    ("whom", "what", "command"),
    [
        ("the job", "scontrol requeue", ("scontrol", "requeue", "7")),
        ("all ranks", "SIGUSR1", ("scancel", "--signal=USR1", "7")),
        ("all ranks", "SIGKILL", ("scancel", "--signal=KILL", "7.0")),  # of "7" it would be a cancel
        ("the batch script", "SIGTERM", ("scancel", "--batch", "--signal=TERM", "7")),
        ("the batch script and ranks", "SIGUSR1", ("scancel", "--full", "--signal=USR1", "7")),
    ],
)
def test_what_a_user_does(whom, what, command, commands, tmp_path):
    assert strike(Fault(whom, what, "training", 0, 0), JOB, tmp_path, Nobody())
    assert commands == [command]
    waiting = SlurmJob(**{**vars(JOB), "state": "PENDING"})
    assert not strike(Fault(whom, what, "training", 0, 0), waiting, tmp_path, Nobody())
    assert commands == [command]


def test_what_slurm_refuses_has_hit_nothing(monkeypatch, tmp_path):
    def refuse(*command: str, **_: object) -> str:
        raise SlurmError("already completing")

    monkeypatch.setattr(job_faults.slurm, "run", refuse)
    assert not strike(Fault("all ranks", "SIGTERM", "training", 0, 0), JOB, tmp_path, Nobody())


def test_what_the_operator_does(tmp_path):
    operator = Recorder(*OFFERS)
    for pick in (0.1, 0.9):
        assert strike(Fault("a node", "off 15 s", "training", 0, pick), JOB, tmp_path, operator)
    assert operator.asked == [("node-off", "n1", 15, tmp_path), ("node-off", "n2", 15, tmp_path)]


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_operators_program(tmp_path):
    path = program(tmp_path / "operator", f'[ "$1" = offers ] && echo preempt link-off || echo "$@" >>{tmp_path}/done')
    operator = Program(path)
    assert operator.offers == ["preempt", "link-off"]
    assert operator.act("link-off", "n1; rm -r /", 2.5, Path("/a run"))
    assert (tmp_path / "done").read_text() == "link-off n1; rm -r / 2.5 /a run\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo preempt flood", "offers flood; known are rank-kill, node-off"),
        ("echo no power >&2; exit 1", "code 1: no power"),
    ],
)
def test_an_operators_program_that_is_wrong(tmp_path, text, said):
    with pytest.raises(StamoError, match=said):
        Program(program(tmp_path / "operator", text))
    with pytest.raises(StamoError, match="no such program"):
        Program(str(tmp_path / "none"))


def test_a_program_says_that_there_was_nothing_to_hit(tmp_path):
    operator = Program(program(tmp_path / "operator", '[ "$1" = offers ] && echo rank-kill || exit 3'))
    assert not operator.act("rank-kill", "n1", 0, tmp_path)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("backend: local", "without --slurm it is tried"),
        ("nodes: 2\nmin_nodes: 1", "asks for 1 to 2 nodes"),
    ],
)
def test_profiles_that_cannot_be_compared(tmp_path, profile, said):
    (tmp_path / "profile.yaml").write_text(profile)
    with pytest.raises(StamoError, match=said):
        Site(str(tmp_path / "profile.yaml")).processes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"operator": "x"}, "name its profile with --slurm"),
        ({"slurm": "local", "world_sizes": "4"}, "omit --world-sizes and --warm"),
        ({"slurm": "local", "warm": True}, "omit --world-sizes and --warm"),
        ({"slurm": "local", "operator": "/nowhere/x"}, "no such program"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(StamoError, match=said):
        ChaosOptions(Path("toy.yaml"), **options).site()


def test_processes_are_those_of_all_nodes(tmp_path):
    (tmp_path / "profile.yaml").write_text("nodes: 3\nprocesses_per_node: 2")
    assert Site(str(tmp_path / "profile.yaml")).processes() == 6
