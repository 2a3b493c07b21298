"""Ranks keep to the CPUs beside their GPU, and the doctor says where they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stamo_dist.launch.affinity import beside_gpus, long, short
from stamo_dist.launch.doctor.placement import judge_placement
from stamo_dist.launch.doctor.probe import Report

CPUS = sorted(os.sched_getaffinity(0))
BIND = """\
import json, os, sys
from pathlib import Path
from stamo_dist.launch.affinity import bind
said = bind(int(sys.argv[1]), 2, os.environ, Path(sys.argv[2]))
print(json.dumps([said, sorted(os.sched_getaffinity(0))]))
"""


def machine(folder: Path, beside: list[str], threads: dict[int, str]) -> dict[str, str]:
    """/sys of a machine whose GPUs have these CPUs beside them, and an nvidia-smi that names the GPUs."""
    rows = []
    for i, cpus in enumerate(beside):
        device = folder / "sys/bus/pci/devices" / f"0000:{i + 1:x}b:00.0"
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(f"{cpus}\n")
        rows.append(f"{i}, GPU-{i}000-aa, 00000000:{i + 1:X}B:00.0")
    for cpu, siblings in threads.items():
        topology = folder / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\ncat <<'X'\n" + "\n".join(rows) + "\nX\n")
    smi.chmod(0o755)
    return {"PATH": f"{smi.parent}:{os.environ['PATH']}"}


def bound(folder: Path, env: dict[str, str], rank: int) -> tuple[str, list[int]]:
    """What a process of its own says and has after it bound itself."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BIND, str(rank), str(folder / "sys")], check=True, capture_output=True, text=True,
        cwd=root, env={**os.environ, **env, "PYTHONPATH": str(root)}, timeout=120,
    )  # fmt: skip
    said, cpus = json.loads(done.stdout)
    return said, cpus


@pytest.mark.skipif(len(CPUS) < 2, reason="takes two CPUs")
def test_each_process_keeps_to_its_share_of_the_cpus_beside_its_gpu(tmp_path: Path) -> None:
    a, b = CPUS[:2]
    env = machine(tmp_path / "apart", [f"{a}", f"{b}"], {})
    assert bound(tmp_path / "apart", env, 0) == (f"bound to the CPUs {a}, beside GPU 0", [a])
    assert bound(tmp_path / "apart", env, 1) == (f"bound to the CPUs {b}, beside GPU 1", [b])
    env = machine(tmp_path / "shared", [f"{a},{b}", f"{a},{b}"], {a: f"{a}", b: f"{b}"})
    assert [bound(tmp_path / "shared", env, rank)[1] for rank in (0, 1)] == [[a], [b]]
    env = machine(tmp_path / "threads", [f"{a},{b}", f"{a},{b}"], {a: f"{a},{b}", b: f"{a},{b}"})
    assert [bound(tmp_path / "threads", env, rank)[1] for rank in (0, 1)] == [[a, b], [a, b]]  # one core


def test_what_cannot_be_bound_is_said(tmp_path: Path) -> None:
    env = machine(tmp_path, ["9000", "9001"], {})
    said, cpus = bound(tmp_path, env, 1)
    assert (said, cpus) == (f"not bound: none of its CPUs {short(frozenset(CPUS))} is beside GPU 1", CPUS)
    assert bound(tmp_path, {"PATH": str(tmp_path)}, 0) == ("not bound: 0 GPUs of 2 processes are known here", CPUS)


def test_gpus_come_in_the_order_in_which_cuda_shows_them(tmp_path: Path) -> None:
    env = machine(tmp_path, ["0-3", "4-7", "8-11"], {})
    one, two, three = long("0-3"), long("4-7"), long("8-11")
    assert beside_gpus(env, tmp_path / "sys") == [one, two, three]
    assert beside_gpus({**env, "CUDA_VISIBLE_DEVICES": "2,0"}, tmp_path / "sys") == [three, one]
    assert beside_gpus({**env, "CUDA_VISIBLE_DEVICES": "GPU-1000"}, tmp_path / "sys") == [two]
    assert beside_gpus({**env, "CUDA_VISIBLE_DEVICES": ""}, tmp_path / "sys") == []
    assert short(long("8,0-2,5,6\n")) == "0-2,5-6,8"


def placed(rank: int, may_use: str, **other: object) -> Report:
    about = {"host": f"n{rank // 2}", "may_use": may_use, "beside": "0-7", "network": {"NCCL_DEBUG": "WARN"}, **other}
    return replace(Report(rank, 4, rank % 2, 2, "n"), **about)  # type: ignore[arg-type]


def test_the_doctor_says_how_ranks_are_placed() -> None:
    def said(*reports: Report, asked: dict[str, str] | None = None) -> list[str]:
        return [f"{f.level}: {f.what} → {f.fix}" for f in judge_placement(reports, asked or {})]

    good = said(placed(0, "0-3"), placed(1, "4-7"), asked={"NCCL_DEBUG": "WARN", "TOKENS": "1"})
    assert good == [
        "fine: 2 ranks run on CPUs beside their GPU → ",
        "fine: variables of the network: NCCL_DEBUG=WARN → ",
    ]
    far = said(placed(0, "0-3"), placed(1, "8-11"))[0]
    assert far.startswith("warning: 1 of 2 ranks run away from their GPU: rank 1 @ n0 on the CPUs 8-11, and its GPU is")
    assert "cpu_bind: gpu" in far
    crowded = said(placed(0, "0"), placed(1, "0"))[1]
    assert crowded.startswith("warning: n0: 2 ranks share the CPUs 0 → raise cpus_per_gpu")
    other = said(placed(0, "0-3"), placed(2, "0-3", network={"NCCL_DEBUG": "INFO"}), asked={"NCCL_DEBUG": "WARN"})
    assert other[1].startswith("warning: n1: NCCL_DEBUG is INFO, and the profile says WARN → a setup line, a module or")
    assert other[2].startswith("warning: n0 and n1 have other variables: NCCL_DEBUG WARN ≠ INFO")
    assert said(placed(0, "", beside="", network={})) == ["fine: variables of the network: none is set → "]
