"""Removing locks left behind by a killed compiler.

PyTorch compiles an extension, such as DeepSpeed's for CPUs, under a file `lock` in its build folder, and every process
that needs the extension waits until it is removed: for ever, if its owner was killed. The owner has the file open, so
on a local disk a lock that no process has open is dead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import FileLock

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}


def clear_dead_locks(say: Callable[[str], None]) -> None:
    """Remove the dead locks of DeepSpeed's extensions; `say` is called with notes for the user."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    for lock in [*Path(root).glob("deepspeed_*/lock"), *Path(root).glob("*/deepspeed_*/lock")]:
        with FileLock(lock.with_name("stamo.lock")):  # else one process might remove a lock just created by another
            if not lock.exists() or _is_open(lock):
                continue
            if _is_local(lock):
                lock.unlink(missing_ok=True)
                say(f"removed {lock}: the process that compiled there was killed")
            else:
                say(f"{lock}: no process of this machine compiles there; if none of another does, remove it")


def _is_open(file: Path) -> bool:
    name = os.path.realpath(file)
    for process in psutil.process_iter():
        try:
            if any(opened.path == name for opened in process.open_files()):
                return True
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return False


def _is_local(file: Path) -> bool:
    name = os.path.realpath(file)
    over = [p for p in psutil.disk_partitions(all=True) if name.startswith(p.mountpoint.rstrip("/") + "/")]
    return bool(over) and max(over, key=lambda p: len(p.mountpoint)).fstype in _LOCAL
