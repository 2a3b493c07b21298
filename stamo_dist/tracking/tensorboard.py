"""TensorBoard's event files in RUN/tensorboard, if the recipe enables `tracking.tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stamo_dist.errors import RunError
from stamo_dist.extras import how_to_install, is_installed


class TensorBoard:
    """Scalars and pictures by step; each start hides the steps of earlier ones after the one that it goes on from."""

    def __init__(self, folder: Path, step: int):
        self._folder = folder / "tensorboard"
        self._begin(step)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of metrics."""
        step = line["step"]
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        numbers |= {f"alarm/{name}": z for name, z in line.get("alarms", {}).items()}
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def sync(self) -> None:
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Hide the steps after `step`."""
        self._writer.close()
        self._begin(step)

    def close(self) -> None:
        self._writer.close()

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)


def check_installed() -> None:
    """Raises: RunError: The package is missing."""
    if not is_installed("tensorboard"):
        raise RunError(f"tracking.tensorboard: needs the package tensorboard; {how_to_install('tensorboard')}")
