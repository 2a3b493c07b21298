"""Feature rows of frames for each representation, cached on disk; a motion is the difference of two rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers, which imports torchvision

from stamo_dist.data.frames import Episodes
from stamo_dist.evaluate.held_out import load, spread
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.models.weights import save

PIXELS, POOLED, PATCHES, RANDOM, STATE = REPRESENTATIONS = (
    "pixel difference",
    "Δencoder, pooled",
    "Δencoder, patches",
    "random encoder",
    "state (ours)",
)
_VERSION = 1  # version of the rows' meaning
_STANDARDISE = 256


class Representations:
    """Frames → one row of each representation, float32.

    pixel difference: the frame averaged over a grid of `pixels` × `pixels` cells, by default so that its row is as
    long as the state's. Δencoder: the tokenizer's patch tokens, their mean, and all of them (averaged over a grid if
    they have more than `patch_dim` numbers). random encoder: the same encoder and compressor architecture with random
    weights, with states standardised on `frames` if the recipe does so. state: the tokenizer's.
    """

    def __init__(
        self, tokenizer: Tokenizer, frames: Tensor, *, patch_dim: int, pixels: int | None = None, seed: int = 0
    ):
        self.tokenizer, self.patch_dim, self.seed = tokenizer, patch_dim, seed
        cfg, encoder = tokenizer.cfg.compressor, tokenizer.encoder
        self.grid = max(1, min(frames.shape[1], pixels or round((cfg.tokens * cfg.dim / 3) ** 0.5)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._encoder = encoder.untrained().to(tokenizer.device).eval()
            self._compressor = Compressor(cfg, encoder.dim).to(tokenizer.device).eval()
        if cfg.standardise:
            with torch.no_grad():
                parts = [self._encoder(part) for part in frames.to(tokenizer.device).split(32)]
                self._compressor.standardise(torch.cat(parts))
        self.key = {"version": _VERSION, "tokenizer": tokenizer.fingerprint(), "patch_dim": patch_dim, "seed": seed}
        self.key["grid"] = self.grid
        self.key["standardised_on"] = hashlib.sha256(frames.cpu().numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, H, W, 3) → representation → (B, dimension) on the CPU."""
        images = images.to(self.tokenizer.device)
        patches = self.tokenizer.encoder(images).float()
        rows = {
            PIXELS: F.adaptive_avg_pool2d(to_float(images), self.grid),
            POOLED: patches.mean(1),
            PATCHES: self._bounded(patches),
            RANDOM: self._compressor(self._encoder(images)),
            STATE: self.tokenizer.encode(images),
        }
        return {name: row.flatten(1).float().cpu() for name, row in rows.items()}

    def _bounded(self, patches: Tensor) -> Tensor:
        """(B, N, D) patch tokens of a square image, averaged over the finest grid with at most `patch_dim` numbers."""
        side = round(patches.shape[1] ** 0.5)
        grid = min(side, max(1, int((self.patch_dim / patches.shape[2]) ** 0.5)))
        square = patches.transpose(1, 2).unflatten(-1, (side, side))
        return square if grid == side else F.adaptive_avg_pool2d(square, grid)


class FeatureCache:
    """One file per episode under `folder`, named by a hash of all settings; written atomically.

    Without a folder, features are cached in memory only.
    """

    def __init__(self, folder: Path | None, represent: Representations, batch: int = 64):
        self.folder, self._represent, self._batch = folder, represent, batch
        self._memory: dict[str, dict[str, Tensor]] = {}

    def episode(self, episodes: Episodes, split: str, index: int) -> dict[str, Tensor]:
        """Representation → (frames of the episode, dimension)."""
        manifest, found = episodes.manifest, episodes.episodes[index]
        key = {
            **self._represent.key,
            "source": manifest.name,
            "fingerprint": manifest.source_fingerprint,
            "checksums": manifest.checksums,
            "options": manifest.options,
            "split": split,
            "camera": episodes.camera,
            "episode": found.id,
            "length": found.length,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
        if self.folder is None:
            if name not in self._memory:
                self._memory[name] = self._compute(episodes, index)
            return self._memory[name]
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except SafetensorError:
                path.unlink()
        rows = self._compute(episodes, index)
        unfinished = path.with_suffix(".tmp")
        save(rows, unfinished)
        unfinished.replace(path)
        return rows

    def _compute(self, episodes: Episodes, index: int) -> dict[str, Tensor]:
        length = episodes.episodes[index].length
        parts = [
            self._represent(load(episodes, index, range(first, min(first + self._batch, length))))
            for first in range(0, length, self._batch)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in REPRESENTATIONS}


def standardising_frames(training: Mapping[str, Episodes]) -> Tensor:
    """Evenly spaced training frames of all sources, uint8 (n, H, W, 3)."""
    share = -(-_STANDARDISE // len(training))
    found = []
    for episodes in training.values():
        chosen = spread(share, len(episodes.episodes))
        for e in chosen:
            found.append(load(episodes, e, spread(-(-share // len(chosen)), episodes.episodes[e].length)))
    return torch.cat(found)


def motions(rows: Tensor, k: int) -> Tensor:
    """(T, d) frames of an episode → (T − k, d): each frame's difference to the one k later."""
    return rows[k:] - rows[:-k]


def pairs(cached: Callable[[int], Mapping[str, Tensor]], chosen: list[int], k: int, name: str) -> tuple[Tensor, Tensor]:
    """Motions over k frames of the chosen episodes, (n, d), and the episode of each, (n,)."""
    found = [motions(cached(e)[name], k) for e in chosen]
    return torch.cat(found), torch.cat([torch.full((len(part),), e) for e, part in zip(chosen, found, strict=True)])
