"""The peak memory of a step's tensors, found by running the step on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationPeak(TorchDispatchMode):
    """Counts the bytes of all live tensors created inside; `peak` is the maximum.

    Parameters and buffers of `modules` and their gradients are not counted.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.peak = self._now = 0
        self._known = weakref.WeakSet[Any]()
        self._counted = weakref.WeakKeyDictionary[Any, int]()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._known.add(tensor.untyped_storage())
            for p in module.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._leave_out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._counted[storage] = size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size

    def _leave_out(self, p: Tensor) -> None:
        assert p.grad is not None
        self._now -= self._counted.pop(p.grad.untyped_storage(), 0)
        p.grad = None


def peak(step: Callable[[], Tensor], modules: Iterable[nn.Module]) -> int:
    """Peak bytes of the tensors of `step`, which returns a loss, and of its backward pass."""
    with ActivationPeak(modules) as counted:
        step().backward()
    return counted.peak
