"""What a step asks of a device, seen from its operators: where the host would wait, and which attention would run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
#: The size of what they give depends on values, which the host must know.
_WAITING = {
    _aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default, _aten.unique_dim.default,
    _aten.unique_consecutive.default, _aten.bincount.default, _aten.repeat_interleave.Tensor, _aten.equal.default,
}  # fmt: skip
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class HostWaits(TorchDispatchMode):
    """Lists the operators at which the host would wait for a GPU; the meta device stands for it.

    A copy between it and the host counts unless it is non-blocking: a batch's, which the loader has pinned, is. Reading
    a number gives 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _MadeOnHost(self.found)

    def __enter__(self) -> HostWaits:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            if args[0].is_meta:
                self.found.append(str(func))
                return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        elif func in _WAITING:
            self._count(func, args[0].is_meta)
        elif func in _INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self._count(func, any(i.is_meta for i in masks))
        elif func in _COPIES:
            self._count(func, _crosses(func, args, kwargs) and not kwargs.get("non_blocking", _third(func, args)))
            if func is _aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _count(self, func: Any, waits: bool) -> None:
        if waits:
            self.found.append(str(func))


class _MadeOnHost(TorchFunctionMode):
    """torch.tensor(…, device=…) copies from memory that is not pinned; no operator shows it on the meta device."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and made.is_meta and not isinstance(args[0], Tensor):
            self._found.append(func.__name__)
        return made


def _crosses(func: Any, args: Any, kwargs: Any) -> bool:
    if func is _aten.copy_.default:
        return bool(args[0].is_meta != args[1].is_meta)
    device = kwargs.get("device")
    return device is not None and (torch.device(device).type == "meta") != bool(args[0].is_meta)


def _third(func: Any, args: Any) -> bool:
    return bool(func is _aten.copy_.default and len(args) > 2 and args[2])


class Attention(NamedTuple):
    """One call of scaled_dot_product_attention."""

    query: tuple[int, ...]
    dtype: torch.dtype
    mask: tuple[int, ...] | None
    causal: bool
    kernel: str


class Attentions(TorchFunctionMode):
    """Lists the attention calls and the kernel that CUDA would choose for each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        mask = None if attn_mask is None else tuple(attn_mask.shape)
        self.found.append(
            Attention(tuple(q.shape), q.dtype, mask, is_causal, kernel((q, k, v), attn_mask, causal=is_causal))
        )


def kernel(qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, *, causal: bool) -> str:
    """Which of flash, efficient and math: the conditions of PyTorch's sdp_utils.cpp for sm80 and later."""
    q = qkv[0]
    half, width = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1]
    plain = all(t.ndim == 4 and t.stride(-1) == 1 and t.dtype == q.dtype for t in qkv)
    if plain and half and mask is None and width <= 256:
        return "flash"
    # 16 bytes at a time; a mask that needs a gradient is summed by the math kernel where it is broadcast
    fits = mask is None or (mask.dtype in (torch.bool, q.dtype) and not mask.requires_grad and not causal)
    if plain and fits and width * q.element_size() % 16 == 0:
        return "efficient"
    return "math"
