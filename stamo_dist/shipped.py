"""What comes with the code: recipes, Slurm profiles, pages and `data_tools`.

In a checkout they lie beside the package, and in a wheel inside it (setup.py), so that the wheel takes no other
top-level name than `stamo_dist`.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
#: The folder of a wheel.
FOLDER = "_shipped"
IS_WHEEL = (_PACKAGE / FOLDER).is_dir()
ROOT = _PACKAGE / FOLDER if IS_WHEEL else _PACKAGE.parent
RECIPES = ROOT / "recipes"
PROFILES = ROOT / "slurm"
#: Packages of the code → their folders.
PACKAGES = {"stamo_dist": _PACKAGE, "data_tools": ROOT / "data_tools"}


def page(name: str) -> str:
    """How a message names a page of the documentation, such as `gpu.md`: a path that can be opened."""
    return str(ROOT / "docs" / name) if IS_WHEEL else f"docs/{name}"


def reach_data_tools() -> None:
    """Make `import data_tools` find the one of this package, in this process and in those it spawns."""
    if IS_WHEEL and str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
