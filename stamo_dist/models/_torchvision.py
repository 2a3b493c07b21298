"""Let `import torchvision` work beside a torch build that its C++ operators were not made for.

transformers imports torchvision whenever it is installed. PyPI's torchvision is built for CUDA; beside a CPU torch its
operator library does not load and the import dies on "operator torchvision::nms does not exist". Nothing here calls
those operators, so declaring their schemas is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: torch.library.Library | None = None  # a Library that is collected takes its schemas with it


def _loads() -> bool:
    """Whether torchvision is absent, or its operators are there or can be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return True
    for extension in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


def declare_missing_operators() -> None:
    """Declare the operator schemas that `import torchvision` needs, only when they are really missing."""
    global _declared
    if _declared is None and not _loads():
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS.values():
            _declared.define(schema)
