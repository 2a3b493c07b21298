"""Meta-World's episodes as `stamo data simulate metaworld` writes them: LIBERO's HDF5 layout, four-dimensional actions.

The simulator moves the hand's target by action · action_scale, 1/100 m, along x, y and z (set_xyz_action of
metaworld/sawyer_xyz_env.py), keeps its orientation, and presses the fingers together with the fourth number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_tools.formats.libero import LiberoReader
from data_tools.formats.source import ActionSpec, Scan
from stamo_dist.errors import DataError

ACTION = ActionSpec(
    dim=4,
    text="hand delta dx dy dz (1 = 1 cm), gripper effort (-1 opens, +1 closes)",
    mode="delta",
    translation=(0, 1, 2),
    metres=0.01,
    gripper=3,
    gripper_open=-1.0,
    gripper_closed=1.0,
)


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
        scan = super().scan()
        if scan.action is None or scan.action.dim != ACTION.dim:
            dim = scan.action.dim if scan.action else 0
            raise DataError(f"{self.src}: actions have {dim} dimensions, Meta-World's 4; is it `libero`?")
        return replace(scan, action=ACTION)
