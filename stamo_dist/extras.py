"""How to install the packages of an optional part, for messages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_PACKAGE = "stamo-dist"


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def how_to_install(extra: str) -> str:
    """The pip command that installs the packages of an extra ("sim", "serve", …) into this environment.

    In a checkout it installs the checkout with the extra; elsewhere the packages by name, as no index has this one.
    """
    root = Path(__file__).parents[1]
    if (root / "setup.cfg").is_file():
        here = "." if root == Path.cwd() else str(root)
        return f"{_pip()} install -e '{here}[{extra}]'"
    needed = map(Requirement, metadata.requires(_PACKAGE) or [])
    wanted = [r for r in needed if r.marker is not None and _belongs(r, extra)]
    return f"{_pip()} install {' '.join(_quoted(r) for r in wanted)}"


def _belongs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _quoted(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"'{requirement.name}{extras}{requirement.specifier}'"


def _pip() -> str:
    """`pip` if the one on PATH belongs to this Python."""
    found = shutil.which("pip")
    own = os.path.join(sys.prefix, "bin")
    return "pip" if found and os.path.samefile(os.path.dirname(found), own) else f"{sys.executable} -m pip"
