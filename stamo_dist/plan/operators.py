"""The operators of a training step, by running its shapes: arithmetic, bytes, and which part of the model asks."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stamo_dist.models.flops import counter

Kind = Literal["gemm", "convolution", "attention", "memory"]
REST = "rest"  # the part of what no named part asks for


@dataclass(frozen=True)
class Operator:
    """One kernel of an eager step, or several that a compiler has fused.

    `reads`, `writes`: number of a storage → bytes. `again`: part of a recomputation in the backward pass.
    """

    part: str
    kind: Kind
    backward: bool
    again: bool
    flops: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


class OperatorTrace(TorchDispatchMode):
    """Lists the operators that run inside, in their order; views and empty tensors cost nothing and are left out."""

    def __init__(self, parts: Mapping[str, Iterable[nn.Module]]):
        super().__init__()
        self.found: list[Operator] = []
        self._flops: Any = counter().flop_registry
        self._numbers, self._next = WeakKeyDictionary[Any, int](), itertools.count()
        self._stack: list[str] = [REST]
        self._since: list[tuple[int, str]] = [(-1, REST)]  # autograd's sequence number → the part that runs from it on
        self._hooks = [
            hook
            for name, modules in parts.items()
            for module in modules
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            )
        ]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, made = self._bytes((args, kwargs)), self._bytes(out)
        mutates = func._schema.is_mutable
        packet = func._overloadpacket
        if "empty" in packet.__name__ or (not mutates and made.keys() <= read.keys()):
            return out
        count = self._flops.get(packet)
        node = torch._C._current_autograd_node()
        backward, part = node is not None, self._stack[-1]
        again = backward and torch.is_grad_enabled()
        if backward:
            part = self._since[bisect.bisect_right(self._since, (node._sequence_nr(), "\uffff")) - 1][1]
        flops = int(count(*args, **kwargs, out_val=out)) if count else 0
        self.found.append(Operator(part, _kind(packet, flops), backward, again, flops, read, made))
        return out

    def _enter(self, part: str) -> None:
        self._stack.append(part)
        self._mark()

    def _leave(self) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        if torch._C._current_autograd_node() is None:
            self._since.append((torch.autograd._get_sequence_nr(), self._stack[-1]))

    def _bytes(self, tree: Any) -> dict[int, int]:
        found: dict[int, int] = {}
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                number = self._numbers.setdefault(storage, next(self._next))
                size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
                found[number] = max(found.get(number, 0), size)
        return found


def traced(step: Callable[[], Tensor], parts: Mapping[str, Iterable[nn.Module]]) -> list[Operator]:
    """The operators of `step`, which returns a loss, and of its backward pass."""
    with OperatorTrace(parts) as trace:
        step().backward()
    return trace.found


def fused(operators: Iterable[Operator]) -> list[Operator]:
    """As a compiler would run them: what is memory-bound between two products becomes one kernel.

    It reads once what it needs from others, and writes what others need later, what the backward pass needs included.
    """
    listed = list(operators)
    last_read = {number: i for i, op in enumerate(listed) for number in op.reads}
    found: list[Operator] = []
    place = 0
    for _, run in itertools.groupby(listed, lambda op: (op.part, op.backward, op.again, _own(op))):
        group = list(run)
        place += len(group)
        if group[0].kind != "memory" or group[0].part == REST:
            found += group
            continue
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for op in group:
            reads |= {n: size for n, size in op.reads.items() if n not in writes}
            writes |= op.writes
        kept = {n: size for n, size in writes.items() if n in reads or last_read.get(n, place) >= place}
        found.append(Operator(group[0].part, "memory", group[0].backward, group[0].again, 0, reads, kept))
    return found


def _own(op: Operator) -> int | str:
    return "memory" if op.kind == "memory" else id(op)


def _kind(packet: Any, flops: int) -> Kind:
    if not flops:
        return "memory"
    name = packet.__name__
    if "attention" in name:
        return "attention"
    return "convolution" if "convolution" in name else "gemm"
