"""Imports timm without W&B, which timm loads for a summary that is not used here.

W&B takes a second and makes two folders in the system's temporary one as it is imported, which a process that is killed
or leaves by `os._exit` leaves there. Import this module before timm.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
if "wandb" in _modules:
    import timm
else:
    _modules["wandb"] = None  # its import fails, as if it were not installed
    try:
        import timm  # noqa: F401
    finally:
        del _modules["wandb"]
