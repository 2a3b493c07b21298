"""A compiler that was killed does not make the next start wait for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stamo_dist.distributed.extension_locks import clear_dead_locks

COMPILER = """\
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("compiling", flush=True)
time.sleep(60)
"""


def test_only_the_lock_of_a_dead_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock, other = tmp_path / "py_cpu" / "deepspeed_x" / "lock", tmp_path / "somebody_elses" / "lock"
    for path in (lock, other):
        path.parent.mkdir(parents=True)
    other.touch()
    said: list[str] = []
    command = [sys.executable, "-c", COMPILER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling\n"
        clear_dead_locks(said.append)
        assert lock.exists()
        assert not said
        process.kill()
    clear_dead_locks(said.append)
    assert not lock.exists()
    assert other.exists()
    assert len(said) == 1
    assert str(lock) in said[0]
