"""What is known of each sample by its place in its episode: its instruction, and if it is labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stamo_dist.data.mixture import Mixture
from stamo_dist.data.supervised import Table, labelled_episodes, sample_streams
from stamo_dist.errors import DataError

_NAMED = 3


def episode_tables(mixture: Mixture) -> dict[str, list[Table]]:
    """The episodes of every folder of every source.

    Raises:
        DataError: A table is missing or damaged.
    """
    tables: dict[str, list[Table]] = {}
    for name, folders in zip(mixture.sources, mixture.opened, strict=True):
        split = mixture.data.sources[name].split
        tables[name] = [(f.manifest, f.episodes(split)) for f in folders]
    return tables


class Instructions:
    """Texts by sample number, from `episode_tables` alone: no frame is opened, and no text travels with a batch.

    An episode without an instruction takes `data.sources.NAME.instruction`.

    Attributes:
        texts: The distinct instructions, sorted.

    Raises:
        DataError: Episodes have none; all sources at once.
    """

    def __init__(self, mixture: Mixture, tables: Mapping[str, Sequence[Table]]):
        problems: list[str] = []
        begins: list[np.ndarray] = []
        texts: list[list[str]] = []
        labelled: list[bool] = []
        offset = 0
        for name, folders in zip(mixture.sources, mixture.opened, strict=True):
            source = mixture.data.sources[name]
            for folder, (manifest, episodes) in zip(folders, tables[name], strict=True):
                spans = [
                    (e.id, e.start + t, (text or source.instruction or "").strip(), mine)
                    for e, mine in zip(episodes, labelled_episodes(len(episodes), source.labelled), strict=True)
                    for t, text in {0: e.instruction, **e.later_instructions}.items()
                ]
                if silent := list(dict.fromkeys(id for id, _, text, _ in spans if not text)):
                    more = ", …" if len(silent) > _NAMED else ""
                    problems.append(
                        f"data.sources.{name}: {len(silent)} of {len(episodes)} episodes of {folder.path} have no "
                        f"instruction ({', '.join(silent[:_NAMED])}{more}); set data.sources.{name}.instruction"
                    )
                starts = np.array([start for _, start, _, _ in spans], np.int64)
                for _ in range(sample_streams(mixture.data, source, manifest)):
                    begins.append(offset + starts)
                    texts.append([text for _, _, text, _ in spans])
                    labelled += [mine for _, _, _, mine in spans]
                    offset += manifest.splits[source.split].frames
        if problems:
            raise DataError("\n".join(problems))
        self.texts = sorted({text for found in texts for text in found})
        number = {text: i for i, text in enumerate(self.texts)}
        self._begins = torch.from_numpy(np.concatenate(begins))  # (S,) first samples of stretches
        self._numbers = torch.tensor([number[text] for found in texts for text in found])
        self._labelled = torch.tensor(labelled)

    def labelled(self, samples: Tensor) -> Tensor:
        """Sample numbers, int64 (b,) → whether the actions of their episodes may be read, bool (b,)."""
        return self._labelled[self._span(samples)]

    def of(self, samples: Tensor) -> Tensor:
        """Sample numbers, int64 (b,) → index into `texts`, int64 (b,)."""
        return self._numbers[self._span(samples)]

    def _span(self, samples: Tensor) -> Tensor:
        return torch.searchsorted(self._begins, samples, right=True) - 1

    def to(self, device: torch.device) -> None:
        self._begins, self._numbers = self._begins.to(device), self._numbers.to(device)
        self._labelled = self._labelled.to(device)
