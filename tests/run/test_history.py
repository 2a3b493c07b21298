"""Histories are read and cut off at their end: what stays, what is told, and what it costs."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from stamo_dist.errors import RunError
from stamo_dist.run import folder, history
from stamo_dist.run.folder import RunFolder, append_line
from stamo_dist.run.history import backwards, last_objects, sample
from stamo_dist.tracking import rewind as module
from stamo_dist.tracking.metrics_file import MetricsFile, last_metrics, read_late, read_metrics
from stamo_dist.tracking.rewind import rewind

ROOT = Path(__file__).resolve().parents[2]


def line(step: int, size: int = 0) -> bytes:
    return json.dumps({"step": step, "loss": 1 / step, "pad": "x" * size}).encode() + b"\n"


def late(step: int) -> bytes:
    return json.dumps({"step": step, "eval/rollout/success": 50.0}).encode() + b"\n"


def test_backwards_gives_every_line_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        monkeypatch.setattr(history, "_BLOCK", draw.choice([1, 2, 3, 5, 8, 64]))
        content = bytes(draw.choice(b"ab\n") for _ in range(draw.randrange(40)))
        expected, at = list[tuple[int, bytes]](), 0
        for whole in content.splitlines(keepends=True):
            expected.append((at, whole))
            at += len(whole)
        assert list(backwards(io.BytesIO(content)))[::-1] == expected, content


@pytest.mark.parametrize("seed", range(40))
def test_what_stays_is_what_a_reading_of_the_whole_file_keeps(tmp_path: Path, seed: int) -> None:
    """Late lines, a torn end, strays of a writer that was cut off; against the definition, line by line."""
    draw = random.Random(seed)
    lines, step = list[bytes](), 0
    for _ in range(draw.randrange(1, 120)):
        step += draw.choice([1, 1, 1, 10])
        lines.append(line(step, draw.choice([0, 0, 300])))
        if draw.random() < 0.1:
            lines.append(late(draw.randrange(1, step + 1)))
    torn = draw.choice([b"", b'{"step": 4', line(step + 1)[:-1], line(1)[:-1] if step < 16 else b""])
    path, resumed = tmp_path / "metrics.jsonl", draw.randrange(0, step + 3)
    path.write_bytes(b"".join(lines) + torn)
    expected = [raw for raw in lines if json.loads(raw)["step"] <= resumed]
    if torn.endswith(b"}") and json.loads(torn)["step"] <= resumed:
        expected.append(torn + b"\n")
    file = MetricsFile(path, resumed)
    assert file.notes == []
    assert path.read_bytes() == b"".join(expected)
    file.write({"step": resumed + 1})
    assert path.read_bytes() == b"".join(expected) + b'{"step": %d}\n' % (resumed + 1)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


KILLED = """
import os, sys
from pathlib import Path
from stamo_dist.tracking import rewind as module
name, number = sys.argv[2], int(sys.argv[3])
calls = [0]
def killing(call):
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] > number:
            os._exit(9)
        return call(*args, **kwargs)
    return wrapped
module.os.truncate = killing(os.truncate)
module.write_atomic = killing(module.write_atomic)
module._append = killing(module._append)
Path.unlink = killing(Path.unlink)
module.rewind(Path(sys.argv[1]), int(name))
"""


@pytest.mark.parametrize("number", range(5))
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path, number: int) -> None:
    """A rewind to step 30 is killed before its n-th change of the disk; the next start does it, at 30 or before."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*map(line, range(1, 41)), late(10), line(41), late(20), line(42), b'{"st']))
    command = [sys.executable, "-c", KILLED, str(path), "30", str(number)]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == (9 if number < 4 else 0)
    resumed = 30 - number
    assert rewind(path, resumed) == []
    assert path.read_bytes() == b"".join([*map(line, range(1, resumed + 1)), late(10), late(20)])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_damaged_lines_are_named_and_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*map(line, range(1, 21)), b"\0\0\0 lost block\n", line(21), b"[1]\n", line(22)]))
    notes = rewind(path, 21)
    assert notes == [f"{path}: 2 lines at its end cannot be read; moved to {path}.damaged"]
    assert path.read_bytes() == b"".join(map(line, range(1, 22)))
    assert Path(f"{path}.damaged").read_bytes() == b"\0\0\0 lost block\n[1]\n"


@pytest.mark.parametrize("content", [b"time,loss\n1,2\n", b"\x89HDF", b"\0" * 5000, b'{"epoch": 1}\n', None])
def test_a_foreign_file_is_named_and_kept_aside(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "metrics.jsonl"
    for aside in ("metrics.jsonl.foreign", "metrics.jsonl.foreign-2"):
        path.mkdir() if content is None else path.write_bytes(content)
        file = MetricsFile(path, 7)
        assert file.notes == [
            f"{path}: has no line of a step, so another program wrote it; it is {tmp_path / aside} now, and a new one "
            "begins"
        ]
        assert content is None or (tmp_path / aside).read_bytes() == content
        file.write({"step": 8})
        assert path.read_bytes() == b'{"step": 8}\n'
        path.unlink()


@pytest.mark.parametrize("content", [b"", b"{", b'{"step": 1, "lo', line(3)])
def test_a_file_of_which_nothing_stays_is_not_foreign(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert rewind(path, 0) == []
    assert path.read_bytes() == b""


def test_who_may_not_write_cuts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))

    def refuse() -> None:
        raise RunError("cut off")

    with pytest.raises(RunError, match="cut off"):
        MetricsFile(path, 1, refuse)
    assert path.read_bytes() == line(1) + line(2)


def test_resuming_reads_no_more_than_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 MB it reads less than 10, whatever was trained before; the file keeps its place on the disk."""
    path, steps = tmp_path / "metrics.jsonl", 30_000
    with path.open("wb") as f:
        f.writelines(line(step, 10_000) for step in range(1, steps + 1))
    before, read = path.stat(), [0]

    def counted(file: io.BufferedReader) -> object:
        for start, raw in backwards(file):
            read[0] = before.st_size - start
            yield start, raw

    monkeypatch.setattr(module, "backwards", counted)
    rewind(path, steps - 500)
    assert read[0] < 10_000_000
    assert path.stat().st_ino == before.st_ino
    assert next(last_objects(path))["step"] == steps - 500


def test_a_long_file_is_sampled_and_its_end_exact(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line(step, step % 100) for step in range(1, 5001)]
    lines[4000:4000] = [late(10), b"damaged\n"]
    path.write_bytes(b"".join(lines) + b'{"torn')
    whole = read_metrics(path)
    assert [found["step"] for found in whole.objects] == list(range(1, 5001))
    assert (whole.last, whole.damaged, whole.even) == (None, 1, whole.objects)
    part = sample(path, lambda found: "loss" in found, points=100, last=20, whole=1000)
    steps = [found["step"] for found in part.objects]
    assert part.last == 20
    assert steps[-20:] == list(range(4981, 5001))
    assert steps[0] == 1
    gaps = [b - a for a, b in pairwise(steps[:-20])]
    assert 95 <= len(steps) - 20 <= 100
    assert all(30 <= gap <= 70 for gap in gaps), gaps
    assert [found["step"] for found in part.even] == [*steps[:-20], 5000]
    few = sample(path, lambda found: "loss" in found, points=100_000, last=20, whole=1000)
    assert [found["step"] for found in few.objects] == list(range(1, 5001)), "more points than lines"
    assert read_late(path) == {10: json.loads(late(10))}
    assert [(last_metrics(path, step) or {}).get("step") for step in (6000, 77, 0)] == [5000, 77, None]
    assert sample(tmp_path / "none").objects == []


def test_a_line_after_a_torn_one_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, '{"n": 1}')
    with path.open("a") as f:
        f.write('{"torn')
    append_line(path, '{"n": 2}')
    append_line(path, '{"n": 3}')
    assert [found["n"] for found in last_objects(path)] == [3, 2, 1]


def test_a_start_that_is_killed_while_it_describes_itself_loses_no_change(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.resolved.write_text("name: old\n")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "append_line", killed)
    with pytest.raises(KeyboardInterrupt):
        run.describe("", "name: new\n", [], step=1, processes=1, sources={}, changed={"name": ["old", "new"]})
    assert run.resolved.read_text() == "name: old\n"
