"""The operator of a test cluster, for `stamo chaos`: it has all of the cluster in hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster import Cluster

from stamo_dist.chaos.job_faults import OFFERS

_RANK = {"stamo_dist.launch.rank", "stamo_dist.cli"}  # modules that a rank runs, one after the other


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, in memory; mount it before a cluster starts, whose nodes see it then."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass(frozen=True)
class ClusterOperator:
    """`offers`: without disk-full where the runs have no file system of their own."""

    cluster: Cluster
    offers: Collection[str] = OFFERS

    def act(self, name: str, node: str, seconds: float, run: Path) -> bool:
        if name == "rank-kill":
            return self._kill_rank(node, run)
        if name == "node-off":
            self.cluster.kill_node(node)
            time.sleep(seconds)
            self.cluster.start_node(node)
        elif name == "controller-off":
            with self.cluster.no_controller():
                time.sleep(seconds)
        elif name == "link-off":
            with self.cluster.unlinked(node):
                time.sleep(seconds)
        elif name == "disk-full":
            _fill(run.parent, seconds)
        else:
            self._preempt(node)
        return True

    def _kill_rank(self, node: str, run: Path) -> bool:
        for process in psutil.process_iter(["name", "cmdline", "environ"]):
            about = process.info["environ"] or {}
            if (
                (about.get("STAMO_RUN"), about.get("SLURMD_NODENAME")) == (str(run), node)
                and process.info["name"].startswith("python")
                and _RANK & {*(process.info["cmdline"] or ())}
            ):
                process.kill()
                return True
        return False

    def _preempt(self, node: str) -> None:
        """A job of a higher partition takes the node for a second."""
        wish = ["sbatch", "--parsable", "-p", "high", "-w", node, "-c", str(self.cluster.cpus), "-o", os.devnull]
        job = self.cluster.run(*wish, "--wrap", "sleep 1").strip()
        self.cluster.until(lambda: self.cluster.state(job) == "COMPLETED")


def _fill(folder: Path, seconds: float) -> None:
    """No room on the file system of `folder` for so long."""
    filler = folder / ".filler"
    until = time.monotonic() + seconds
    try:
        with filler.open("wb") as file:
            while time.monotonic() < until:
                while free := shutil.disk_usage(folder).free:
                    try:
                        os.posix_fallocate(file.fileno(), file.tell(), free)
                        file.seek(0, os.SEEK_END)
                    except OSError:  # taken meanwhile
                        break
                time.sleep(0.02)
    finally:
        filler.unlink()
