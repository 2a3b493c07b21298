"""What a report of a fault needs, without who and where, and without importing torch, which takes longest."""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import stamo_dist
from stamo_dist import shipped
from stamo_dist.run.code import code_hash, git_commit, versions

#: Libraries whose version decides how a run behaves.
LIBRARIES = (
    "torch", "torchvision", "deepspeed", "accelerate", "transformers", "diffusers", "tokenizers", "timm", "peft",
    "mosaicml-streaming", "numpy", "pydantic", "submitit", "wandb", "h5py", "av", "mujoco",
)  # fmt: skip
#: Environment variables that change how a run behaves; only their names are told.
_TELLING = ("CUDA_", "NCCL_", "TORCH_", "PYTORCH_", "STAMO_", "HF_", "OMP_", "MUJOCO_GL", "DS_", "GLOO_", "UCX_")


def described() -> dict[str, str | list[str] | None]:
    """Versions, commit, Python, system, devices and Slurm; no user, host or path, and no value of a variable."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "stamo-dist": stamo_dist.__version__,
        "installed from": "a wheel" if shipped.IS_WHEEL else "a checkout or copy",
        "commit": git_commit(),
        "code": code_hash()[:12],
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{_distribution()}, {platform.system()} {platform.release()}, {platform.machine()}",
        "processors": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {memory:.0f} GiB",
        **{name: version or "not installed" for name, version in versions(LIBRARIES).items()},
        "CUDA of torch": (cuda := cuda_of_torch()),
        "cuDNN": _cudnn(cuda) if cuda else None,
        "GPUs": gpus() if cuda else [],
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "Slurm": _said("sinfo", "--version"),
        "git": _said("git", "--version"),
        "environment": sorted(name for name in os.environ if name.startswith(_TELLING)),
        "terminal": f"{os.environ.get('TERM', 'none')}, {'TTY' if sys.stdout.isatty() else 'pipe'}",
    }


def cuda_of_torch() -> str | None:
    """The CUDA that torch was built for, from its version.py."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    return runpy.run_path(str(file)).get("cuda") if file is not None and file.is_file() else None


def _cudnn(cuda: str) -> str | None:
    """That of the wheel that torch of this CUDA brings, or of the system, as a number: 90100 for 9.1.0."""
    [wheel] = versions((f"nvidia-cudnn-cu{cuda.partition('.')[0]}",)).values()
    library = None if wheel else next(filter(None, map(_library, ("libcudnn.so.9", "libcudnn.so.8"))), None)
    if library is not None:
        library.cudnnGetVersion.restype = ctypes.c_size_t
        return str(library.cudnnGetVersion())
    return wheel


def gpus() -> list[str]:
    """Names of the GPUs that CUDA's driver shows this process: CUDA_VISIBLE_DEVICES counts, as in torch."""
    driver, count, device = _library("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for number in range(count.value):
        name = ctypes.create_string_buffer(256)
        failed = driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetName(name, len(name), device)
        names.append("unknown" if failed else name.value.decode(errors="replace"))
    return names


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "there, but does not answer"
    return done.stdout.strip().partition("\n")[0] or None
