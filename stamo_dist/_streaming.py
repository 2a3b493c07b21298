"""Makes `import streaming.base.x` load x and not the rest of the library.

streaming's packages import all of its datasets, and with them transformers and torchvision: two seconds that every
process of every start would pay for a shuffle and a downloader. Here the two packages are registered as empty modules
and are replaced by the real ones when a name of theirs is requested. Import this module before any part of streaming.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _enter_empty(name: str) -> None:
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    vars(module)["__getattr__"] = lambda attribute: _filled(module, spec, attribute)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _filled(module: ModuleType, spec: ModuleSpec, attribute: str) -> Any:
    if attribute.startswith("__"):  # the import system reads some of these attributes
        raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")
    import stamo_dist._torchvision  # noqa: F401  must precede streaming's datasets

    if vars(module).pop("__getattr__", None) is not None:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    return getattr(module, attribute)


for _name in ("streaming", "streaming.base"):
    _enter_empty(_name)
