"""What a long command says when it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAIT = """
import os, signal, sys, time
from stamo_dist.faults.ended import says_if_ended
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as a launcher leaves it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with says_if_ended(os.environ["KEPT"]):
    if os.environ["WHOM"] == "parent":
        print("ready", flush=True)
    elif child := os.fork():
        os.kill(child, signal.SIGTERM)
        print(os.waitpid(child, 0)[1], flush=True)
        sys.exit()
    time.sleep(20)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def start(kept: str = "", whom: str = "parent", **env: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KEPT": kept, "WHOM": whom, **env}
    quiet = ("-W", "ignore:This process:DeprecationWarning")  # of Python 3.12, for the fork in WAIT beside a thread
    command = [sys.executable, *quiet, "-c", WAIT, "eval", "probe", "a run"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("kept", "env", "code", "said"),
    [
        ("parts are kept", {}, 143, "parts are kept: `stamo eval probe 'a run'` goes on\n"),
        ("", {}, 143, "nothing is kept: `stamo eval probe 'a run'` begins anew\n"),
        ("all", {"WORLD_SIZE": "2", "STAMO_LAUNCHED": "1"}, 143, "all: `stamo eval probe 'a run' --nproc 2` goes on\n"),
        ("all", {"RANK": "1"}, -signal.SIGTERM, None),
    ],
)
def test_sigterm_is_told_with_what_is_kept_and_what_goes_on(kept, env, code, said):
    process = start(kept, **env)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == code
    assert process.communicate()[1] == (f"ended by SIGTERM; {said}" if said else "")


def test_of_ctrl_c_it_says_the_same_and_leaves_it_to_the_caller():
    process = start("parts are kept")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1].splitlines()
    assert said[0] == "ended by Ctrl-C; parts are kept: `stamo eval probe 'a run'` goes on"
    assert said[-1] == "KeyboardInterrupt"


def test_a_forked_process_s_signal_is_not_taken_for_its_parent_s():
    process = start("all", "child")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out.strip(), err) == (0, str(int(signal.SIGTERM)), "")
