"""Who is told that a run has ended, and what is not told to anybody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_local import submit, wait

from stamo_dist.launch import notify, supervise
from stamo_dist.launch.notify import tell_end
from stamo_dist.launch.profile import ProfileError, load_profile
from stamo_dist.launch.record import Event, Launch, main_log, read
from stamo_dist.launch.sbatch import JobOrder, Sbatch

SECRET = "/services/T0/B1/7hrs8fk2"


@dataclass
class Hook:
    """A server that takes what is posted."""

    address: str = ""
    got: list[dict[str, Any]] = field(default_factory=list)
    answer: int = 200
    delay: float = 0


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    made = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(made.delay)
            made.got.append({"path": self.path, "type": self.headers["Content-Type"], **json.loads(body)})
            self.send_response(made.answer)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.address = f"http://127.0.0.1:{server.server_address[1]}{SECRET}"
        monkeypatch.setenv("MY_HOOK", made.address)
        yield made
        server.shutdown()


def launch(run: Path, on: tuple[str, ...] = ("end", "failure"), **about: Any) -> Launch:
    made = Launch("toy", str(run), "", profile={"notify": {"webhook": "${MY_HOOK}", "on": on}}, **about)
    made.write()
    (run / "resolved.yaml").write_text("name: toy\ntrain: {steps: 8}\n")
    return made


def test_what_is_posted(hook: Hook, tmp_path: Path):
    main_log(tmp_path).parent.mkdir()
    main_log(tmp_path).write_text("rank 0 of 1 failed at 2026:\nTraceback (most\n  x\nValueError: broken shard\n")
    said = tell_end(launch(tmp_path), Event("failed", job="7", reason="it ended with code 1"))
    assert said == "notify: told $MY_HOOK"
    [got] = hook.got
    assert (got["path"], got["type"], got["event"], got["job"]) == (SECRET, "application/json", "failed", "7")
    why = "rank 0: ValueError: broken shard (it ended with code 1)"
    assert got["text"] == f"toy: failed at step 0 of 8: {why} ({tmp_path})"


@pytest.mark.parametrize(
    ("on", "told"),
    [(("end",), "finished cancelled failed stopped"), (("failure",), "failed stopped")],
)
def test_ends_and_failures(hook: Hook, tmp_path: Path, on, told):
    asked = launch(tmp_path, on)
    for what in ("submitted", "started", "finished", "cancelled", "requeued", "failed", "preempted", "stopped"):
        tell_end(asked, Event(what))
    assert [got["event"] for got in hook.got] == told.split()


def test_an_array_has_one_end(hook: Hook, tmp_path: Path):
    tell_end(launch(tmp_path, tasks=2), Event("finished", job="7_0"))
    assert hook.got == []


def test_nobody_answers(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is said without the address, and takes no more than its time."""
    asked = launch(tmp_path)
    hook.answer = 500
    said = [tell_end(asked, Event("finished"))]
    monkeypatch.setattr(notify, "_PATIENCE", 0.5)
    hook.delay = 3
    began = time.monotonic()
    said.append(tell_end(asked, Event("finished")))
    assert time.monotonic() - began < 2
    assert notify._post(hook.address, {}) == "no answer in time", "whichever of the two clocks is first"
    for address in ("http://127.0.0.1:9/secret", "ftp://x/secret", "http://[/secret", "http://no where/secret", ""):
        monkeypatch.setenv("MY_HOOK", address)
        said.append(tell_end(asked, Event("finished")))
    assert [line.removeprefix("notify: $MY_HOOK").partition(",")[0].lstrip(": ") for line in said] == [
        "it answered 500", "no answer in time", "Connection refused", "holds no http address", "ValueError",
        "InvalidURL", "is not set here",
    ]  # fmt: skip
    assert not any("secret" in line or SECRET in line for line in said)


def test_a_run_on_this_machine_tells_and_its_processes_do_not_know_whom(hook: Hook, tmp_path: Path):
    command = ("env", "--json")  # prints the names of what may matter; fails for none
    run = submit(tmp_path / "run", *command)
    asked = read(run)
    asked.profile = {"notify": {"webhook": "$MY_HOOK", "on": ["end"]}, "setup": ["env"]}
    asked.write()
    supervise.start([run])
    wait(run, "finished", "failed")
    deadline = time.monotonic() + 10
    while "notify: told $MY_HOOK" not in main_log(run).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(hook.got) == 1
    assert "MY_HOOK=\n" in main_log(run).read_text()
    written = [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in written)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"notify": {"webhook": f"https://x{SECRET}"}}, "write $NAME and `export NAME=https://…` where you submit"),
        ({"notify": {}}, "webhook or mail: name one"),
        ({"notify": {"mail": "me at home"}}, "'me at home' is no address"),
        ({"notify": {"mail": "a@b", "on": ["start"]}}, "on"),
        ({"backend": "local", "notify": {"mail": "a@b"}}, "Slurm sends it, and this profile is of this machine"),
        ({"notify": {"mail": "a@b"}, "sbatch": {"mail-type": "ALL"}}, "mail-user and mail-type are decided by"),
        ({"notify": {"webhook": "$A"}, "environment": {"A": "x"}}, "A is written into the job's script, and a secret"),
    ],
)
def test_profiles_that_cannot_be(tmp_path: Path, profile, said):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(ProfileError) as refused:
        load_profile(str(tmp_path / "p.yaml"))
    assert said in str(refused.value)
    assert SECRET not in str(refused.value)


def test_mail_is_slurms(tmp_path: Path):
    (tmp_path / "p.yaml").write_text("notify: {mail: me@example.org, on: [failure]}\n")
    _, profile = load_profile(str(tmp_path / "p.yaml"))
    script = Sbatch(JobOrder(Launch("toy", str(tmp_path), ""), profile)).text()
    assert "#SBATCH --mail-user=me@example.org\n" in script
    assert "#SBATCH --mail-type=FAIL\n" in script
