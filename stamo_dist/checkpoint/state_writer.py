"""The training state of all processes in one form for every strategy: a safetensors file a process, and an index.

What one process writes goes in three acts. *Plan* (making the writer) needs all processes and happens in the training
thread; *write* is this process's own file, needs nobody and may run beside the next steps; *finish* is rank 0's index.
So a full disk on one process never leaves the others waiting in a collective.

`state/00000.safetensors` holds the elements of which process 0 was in charge, flat, as `PART.NAME@START`; `index.json`
the whole tensors' dtypes and shapes, and AdamW's steps; `pieces.npy` where every piece lies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.sink import Sink
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.distributed.collectives import everywhere, gather
from stamo_dist.distributed.ranges import AVERAGE, MOMENTS, WEIGHT, Range
from stamo_dist.distributed.rank import World

STATE = "state"
INDEX, PIECES = "index.json", "pieces.npy"
PARTS = (WEIGHT, *MOMENTS, AVERAGE)
#: Columns of pieces.npy: rows are sorted by tensor and by first element.
FILE, START, NUMEL, OFFSET = range(4)
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_NAMES = list(DTYPES)


@dataclass(frozen=True)
class _Piece:
    part: str
    at: Range

    @property
    def dtype(self) -> torch.dtype:
        return self.at.parts[self.part].dtype

    @property
    def bytes(self) -> int:
        return self.at.numel * self.dtype.itemsize


def file_of(rank: int) -> str:
    """The name of a process's file."""
    return f"{rank:05d}.safetensors"


class Layout:
    """Where everything lies. It stays the same from save to save; while it does, no rank sends more than one number."""

    def __init__(self) -> None:
        self._mine: NDArray[np.int64] | None = None
        self.tensors: list[tuple[int, int, int]] = []  # rank 0: number, dtype and how many pieces
        self.pieces = b""  # rank 0: the content of pieces.npy

    def agree(self, rows: NDArray[np.int64], sizes: Sequence[int]) -> None:
        """Every process calls it with what it will write: rows of tensor, dtype, first element, how many, offset.

        `sizes`: elements of every tensor, for rank 0.
        """
        if everywhere(self._mine is not None and np.array_equal(rows, self._mine)):
            return
        gathered = gather(rows)
        if gathered is not None:
            self._index(gathered, np.asarray(sizes, np.int64))
        self._mine = rows

    def _index(self, gathered: list[NDArray[np.int64]], sizes: NDArray[np.int64]) -> None:
        files = np.repeat(np.arange(len(gathered)), [len(rows) for rows in gathered])
        rows = np.concatenate(gathered)
        order = np.lexsort((rows[:, 2], rows[:, 0]))
        rows, files = rows[order], files[order]
        numbers, first, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
        ends = rows[:, 2] + rows[:, 3]
        expected = np.concatenate(([0], ends[:-1]))
        expected[first] = 0
        if not (np.array_equal(rows[:, 2], expected) and np.array_equal(ends[first + counts - 1], sizes[numbers])):
            raise AssertionError("the processes' ranges do not cover every tensor exactly once")
        self.tensors = list(zip(numbers.tolist(), rows[first, 1].tolist(), counts.tolist(), strict=True))
        content = io.BytesIO()
        np.save(content, np.column_stack((files, rows[:, 2:])).astype("<i8"), allow_pickle=False)
        self.pieces = content.getvalue()


class StateWriter:
    """Writes `ranges`, of which every element is of exactly one process (see `own`).

    Args:
        ranges: This process's.
        shapes: Of every whole tensor by name, in the same order on every process.
        steps: AdamW's, by parameter.
        staging: Copies what is written, so that training can go on; None where it stands still.
        layout: That of the save before.
    """

    def __init__(
        self,
        world: World,
        ranges: Iterable[Range],
        shapes: Mapping[str, tuple[int, ...]],
        steps: Mapping[str, float],
        staging: Staging | None,
        layout: Layout | None = None,
    ):
        self._rank, self._shapes, self._steps, self._layout = world.rank, shapes, steps, layout or Layout()
        pieces = [_Piece(part, at) for at in ranges for part in at.parts]
        # Then every piece is aligned to its elements.
        self._pieces = sorted(pieces, key=lambda p: -p.dtype.itemsize)
        self._header, offsets = _header(self._pieces)
        numbers = {key: i for i, key in enumerate(self._keys())}
        rows = [
            (numbers[p.part, p.at.name], _NAMES.index(_DTYPES[p.dtype]), p.at.start, p.at.numel, offset)
            for p, offset in zip(self._pieces, offsets, strict=True)
        ]
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()] * len(PARTS)
        self._layout.agree(np.asarray(rows, np.int64).reshape(-1, 5), sizes)
        live = [p.at.flat(p.part) for p in self._pieces]
        self._tensors = live if staging is None else [staging.copy(t) for t in live]
        if staging is not None:
            staging.wait()

    def _keys(self) -> list[tuple[str, str]]:
        return [(part, name) for part in PARTS for name in self._shapes]

    def write(self, folder: Path, files: dict[str, Stored]) -> None:
        """Write and sync this process's file under `folder` and record it.

        Raises:
            OSError: It could not be written.
        """
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        name = f"{STATE}/{file_of(self._rank)}"
        sink = Sink(folder / name)
        sink.write(self._header)
        for tensor in self._tensors:
            sink.write(as_bytes(tensor.cpu()))
        files[name] = sink.finish()

    def finish(self, folder: Path, files: dict[str, Stored]) -> None:
        """Rank 0: write the index.

        Raises:
            OSError: It could not be written.
        """
        keys = self._keys()
        tensors: dict[str, Any] = {}
        for number, dtype, pieces in self._layout.tensors:
            part, name = keys[number]
            tensors[f"{part}.{name}"] = {"dtype": _NAMES[dtype], "shape": self._shapes[name], "pieces": pieces}
        index = {"tensors": tensors, "steps": dict(self._steps)}
        for name, content in ((INDEX, json.dumps(index, indent=1).encode()), (PIECES, self._layout.pieces)):
            sink = Sink(folder / STATE / name)
            sink.write(content)
            files[f"{STATE}/{name}"] = sink.finish()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _header(pieces: list[_Piece]) -> tuple[bytes, list[int]]:
    """What stands before the data of a safetensors file, and where each piece will begin in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, begins = 0, []
    for p in pieces:
        begins.append(at)
        at += p.bytes
        entries[f"{p.part}.{p.at.name}@{p.at.start}"] = {
            "dtype": _DTYPES[p.dtype],
            "shape": [p.at.numel],
            "data_offsets": [begins[-1], at],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [data + begin for begin in begins]
