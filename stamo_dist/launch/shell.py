"""Lines of shell that a profile puts before a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

#: Where `module` is defined, for shells that are no login shells.
_MODULES = (
    "/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh", "/etc/profile.d/z00_lmod.sh", "/usr/share/modules/init/bash",
    "/usr/share/lmod/lmod/init/bash",
)  # fmt: skip


def before_the_run(profile: Mapping[str, Any]) -> list[str]:
    """The profile's modules, of which one that does not load ends the script with code 2; then its setup lines."""
    modules = profile.get("modules") or []
    if not modules:
        return [*profile.get("setup", ())]
    words = shlex.join(modules)
    return [
        f"type module >/dev/null 2>&1 || for f in {' '.join(_MODULES)}; do [ -r $f ] && . $f && break; done",
        f"module load {words} || {{ echo {shlex.quote(f'modules: {words}: could not be loaded')} >&2; exit 2; }}",
        *profile.get("setup", ()),
    ]
