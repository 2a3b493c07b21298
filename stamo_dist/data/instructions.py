"""The instruction of each sample, and whether its episode is labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.data.episode_columns import EpisodeColumns
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.node import Content
from stamo_dist.data.supervised import Table, labelled_episodes, sample_streams
from stamo_dist.errors import DataError

_NAMED = 3
_TABLES: WeakKeyDictionary[Mixture, dict[str, list[Table]]] = WeakKeyDictionary()


def episode_tables(mixture: Mixture) -> dict[str, list[Table]]:
    """The episode columns of every folder of every source; read once per mixture, or once for a node's ranks.

    Raises:
        DataError: A table is missing or damaged.
    """
    if mixture not in _TABLES:
        columns = iter(_columns(mixture))
        _TABLES[mixture] = {
            name: [(folder.manifest, next(columns)) for folder in folders]
            for name, folders in zip(mixture.sources, mixture.opened, strict=True)
        }
    return _TABLES[mixture]


def _columns(mixture: Mixture) -> list[EpisodeColumns]:
    """The columns of all folders, source by source."""
    splits = [mixture.data.sources[name].split for name in mixture.sources]
    where = [(f, split) for split, folders in zip(splits, mixture.opened, strict=True) for f in folders]
    if mixture.node is None:
        return [folder.columns(split) for folder, split in where]

    def read() -> Content:
        packed = [folder.columns(split).packed(number) for number, (folder, split) in enumerate(where)]
        heads, arrays = zip(*packed, strict=True)
        return {"tables": heads}, {name: array for some in arrays for name, array in some.items()}

    file = mixture.node.once("episodes", read)
    return [EpisodeColumns.unpacked(head, file, number) for number, head in enumerate(file.head["tables"])]


class Instructions:
    """Texts by sample number, from `episode_tables` alone: no shard is read, and batches carry no texts.

    An episode without an instruction takes `data.sources.NAME.instruction`.

    Attributes:
        texts: The distinct instructions, sorted.

    Raises:
        DataError: Episodes have none; all sources at once.
    """

    def __init__(self, mixture: Mixture, tables: Mapping[str, Sequence[Table]]):
        problems: list[str] = []
        begins, labelled, numbers = list[NDArray[np.int64]](), list[NDArray[np.bool_]](), list[NDArray[np.int64]]()
        number: dict[str, int] = {}
        offset = 0
        for name, folders in zip(mixture.sources, mixture.opened, strict=True):
            source = mixture.data.sources[name]
            for folder, (manifest, table) in zip(folders, tables[name], strict=True):
                starts, episode, text = table.spans()
                used = np.unique(text)
                texts = {int(i): (table.texts[i] or source.instruction or "").strip() for i in used}
                silent = np.unique(episode[np.isin(text, [i for i, said in texts.items() if not said])])
                if len(silent):
                    more = ", …" if len(silent) > _NAMED else ""
                    problems.append(
                        f"data.sources.{name}: {len(silent)} of {len(table)} episodes of {folder.path} have no "
                        f"instruction ({', '.join(table.ids(silent[:_NAMED].tolist()))}{more}); set "
                        f"data.sources.{name}.instruction"
                    )
                numbered = np.zeros(len(table.texts), np.int64)
                numbered[used] = [number.setdefault(said, len(number)) for said in texts.values()]
                mine = labelled_episodes(len(table), source.labelled)[episode]
                for _ in range(sample_streams(mixture.data, source, manifest)):
                    begins.append(offset + starts)
                    numbers.append(numbered[text])
                    labelled.append(mine)
                    offset += manifest.splits[source.split].frames
        if problems:
            raise DataError("\n".join(problems))
        self.texts = sorted(number)
        place = np.empty(len(number), np.int64)
        place[[number[text] for text in self.texts]] = np.arange(len(number))
        self._begins = torch.from_numpy(np.concatenate(begins))  # (S,) first samples of ranges with one instruction
        self._numbers = torch.from_numpy(place[np.concatenate(numbers)])
        self._labelled = torch.from_numpy(np.concatenate(labelled))

    def labelled(self, samples: Tensor) -> Tensor:
        """Sample numbers, int64 (b,) → whether their episodes are labelled (actions may be used), bool (b,)."""
        return self._labelled[self._span(samples)]

    def of(self, samples: Tensor) -> Tensor:
        """Sample numbers, int64 (b,) → index into `texts`, int64 (b,)."""
        return self._numbers[self._span(samples)]

    def _span(self, samples: Tensor) -> Tensor:
        return torch.searchsorted(self._begins, samples, right=True) - 1

    def to(self, device: torch.device) -> None:
        self._begins, self._numbers = self._begins.to(device), self._numbers.to(device)
        self._labelled = self._labelled.to(device)
