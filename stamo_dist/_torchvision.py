"""Makes `import torchvision` work where its C++ operators do not load.

streaming and transformers import torchvision, which dies ("operator torchvision::nms does not exist") when its
compiled operators do not fit the installed torch, as with the CUDA wheel beside a CPU torch. Declaring the schemas is
enough for its pure-Python parts. Import this module before either of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return None
    for folder in spec.submodule_search_locations or ():
        for extension in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(extension))
            except OSError:
                continue
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in missing:
        library.define(schema)
    return library


# The declarations live exactly as long as this object.
_LIBRARY = _declare_missing()
