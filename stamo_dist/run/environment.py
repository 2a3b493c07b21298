"""What a report of a fault needs, without who and where."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

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
    import torch

    from stamo_dist.device import Device

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
        "CUDA of torch": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version() or "") or None,
        "GPUs": Device.current().all_names,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "Slurm": _said("sinfo", "--version"),
        "git": _said("git", "--version"),
        "environment": sorted(name for name in os.environ if name.startswith(_TELLING)),
        "terminal": f"{os.environ.get('TERM', 'none')}, {'TTY' if sys.stdout.isatty() else 'pipe'}",
    }


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
