"""What a format's Reader tells the driver: which episodes there are, and what one episode holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class EpisodeRef:
    """Where one episode is, and what it is about."""

    id: str
    file: str
    key: str
    length: int
    task: str
    instruction: str
    meta: Mapping[str, Any] = field(default_factory=dict)  # the reader's own notes


@dataclass(frozen=True)
class EpisodeData:
    """One episode's content: L frames per camera (H, W, 3) uint8 upright, actions (L, A), proprio (L, P)."""

    frames: Mapping[str, Iterable[np.ndarray]]
    actions: np.ndarray
    proprio: np.ndarray


@dataclass(frozen=True)
class Scan:
    """What a source holds. `bad` lists the episodes that cannot be used, as "EPISODE: reason"."""

    episodes: list[EpisodeRef]
    files: list[Path]
    cameras: list[str]
    rate_hz: float
    action_dim: int
    proprio_dim: int
    convention: str
    options: dict[str, Any]  # what the reader settled on, for the manifest
    bad: list[str] = field(default_factory=list)


class Reader(Protocol):
    """One source format."""

    def scan(self) -> Scan:
        """Find the episodes without decoding them.

        Raises:
            DataError: All problems of the source at once.
        """

    def read(self, episode: EpisodeRef) -> EpisodeData:
        """Read one episode.

        Raises:
            DataError: This episode cannot be read.
        """
