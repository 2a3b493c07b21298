"""Meta-World's episodes as `stamo data simulate metaworld` writes them: LIBERO's HDF5 layout, four-dimensional actions.

The simulator moves the hand's target by action · action_scale, 1/100 m, along x, y and z (set_xyz_action of
metaworld/sawyer_xyz_env.py), keeps its orientation, and presses the fingers together with the fourth number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_tools.formats.libero import HAND_DELTA, LiberoReader
from data_tools.formats.source import Scan
from stamo_dist.errors import DataError


@dataclass
class MetaworldReader(LiberoReader):
    """Reads a file or a folder of Meta-World episodes; the rate (80 Hz) is the files' own.

    Args:
        src: A .hdf5 file or a folder, searched recursively.
        cameras: Cameras to convert (`obs/CAMERA_rgb`); all when omitted.
        image_timing: "before" or "after" the action, for files that do not say.
        image_orientation: "upright", "mirrored", "flipped_vertically" or "rotated_180", for
            files that do not say.
        only_successful: Leave out demonstrations whose `success` is false.
    """

    def scan(self) -> Scan:
        scan = self._scan()
        if scan.action is None or scan.action.dim != HAND_DELTA.dim:
            dim = scan.action.dim if scan.action else 0
            raise DataError(f"{self.src}: actions have {dim} dimensions, Meta-World's 4; is it `libero`?")
        return replace(scan, action=HAND_DELTA)
