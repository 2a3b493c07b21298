"""How busy this machine is, for the metrics: asked at the logging interval, without waiting for the device."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from stamo_dist.device import Device

SYSTEM = "system/"
"""Prefix of the metrics."""


class SystemUse:
    """Of the node of rank 0; `folder` is on the disk that is looked at."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._gpu = Device.current().is_gpu
        psutil.cpu_percent()  # the next call says what was used since this one

    def look(self) -> dict[str, float]:
        """Shares of the host's memory and processors and of this GPU's time in use, and GB of memory and of disk.

        The GPU's is left out where NVIDIA's library for it (nvidia-ml-py) is missing.
        """
        memory = psutil.virtual_memory()
        found = {
            "cpu": psutil.cpu_percent() / 100,
            "memory": memory.percent / 100,
            "memory_gb": (memory.total - memory.available) / 1e9,
            "disk_free_gb": shutil.disk_usage(self._folder).free / 1e9,
        }
        if self._gpu:
            try:
                found["gpu"] = torch.cuda.utilization(Device.current().torch_device) / 100
            except (ModuleNotFoundError, RuntimeError):
                self._gpu = False
        return {f"{SYSTEM}{name}": round(value, 3) for name, value in found.items()}
