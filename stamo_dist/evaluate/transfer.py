"""Motion transfer: the motion of one episode added to the state of another scene, decoded (STAMO §2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stamo_dist.errors import DataError
from stamo_dist.evaluate.figures import cell_size, file_name, save_motion
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, HeldOutSource, load, spread
from stamo_dist.evaluate.measurement import PartwiseMeasurement, by_group
from stamo_dist.evaluate.metrics import psnr
from stamo_dist.evaluate.options import TransferOptions
from stamo_dist.evaluate.result import Figure
from stamo_dist.evaluate.weights import sampler_noise
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer

ADDED, PIXELS, STILL = KINDS = ("motion added", "pixels added", "scene alone")
Scores = dict[str, list[float]]  # image row → motion kept, scene kept


@dataclass(frozen=True)
class Pair:
    """Episodes of two scenes."""

    number: int
    source: HeldOutSource
    episode: int
    scene: HeldOutSource
    scene_episode: int

    @property
    def name(self) -> str:
        return f"{self.source.name} → {self.scene.name}"

    @property
    def files(self) -> tuple[str, str]:
        """File names of the strip (PNG) and the loop (GIF)."""
        stem = file_name(f"{self.number:02d}_{self.source.name}_{self.scene.name}")
        return f"{stem}.png", f"{stem}.gif"


class MotionTransfer(TransferOptions, PartwiseMeasurement[Pair, Scores]):
    """Motions between held-out episodes of every two sources, both ways, and within each source."""

    name = "transfer"
    title = "Motion transfer"
    about = (
        f"Split {SPLIT!r}, first camera: the motion E(o_t) − E(o_0) of one episode is added to the state of the first "
        "frame of another episode and decoded. motion kept: the decoded pictures are encoded again; cosine of their "
        "motion with the one that was added, mean over the times after the first. scene kept: PSNR against the scene's "
        "first frame over the pixels that are not moving ones. pixels added: the same with pixels for states, no "
        f"model. scene alone: the scene's state decoded at every time. {MOVING_RULE}"
    )
    columns: ClassVar = {
        "source": "motion from → scene of",
        "image": "image",
        "pairs": "pairs",
        "cosine": "motion kept",
        "psnr_still": "scene kept dB",
    }
    by = ("source", "image")
    better: ClassVar = {"cosine": "higher", "psnr_still": "higher"}
    noun = "pairs"

    def select(self) -> None:
        found: list[Pair] = []
        for source in self.sources.values():
            moving = [i for i, episode in enumerate(source.held_out.episodes) if episode.length > 1]
            for scene in self.sources.values():
                for n, e in enumerate(moving[i] for i in spread(self.pairs, len(moving))):
                    others = [i for i in range(len(scene.held_out)) if scene.name != source.name or i != e]
                    if others:
                        found.append(Pair(len(found), source, e, scene, others[(e + n) % len(others)]))
        if not found:
            raise DataError("a motion and a scene are two held-out episodes of 2 frames or more; convert more episodes")
        self.parts = {str(pair.number): pair for pair in found}

    def measure(self, part: Pair) -> Scores:
        length = part.source.held_out.episodes[part.episode].length
        at = sorted({round(i * min(self.span, length - 1) / (self.points - 1)) for i in range(self.points)})
        made = _pictures(self.tokenizer, part, at, self.sampler_steps)
        strip, gif = (self.folder / file for file in part.files)
        rows = {f"{part.source.name}\nreal": made["real"], f"{part.scene.name}\n+ motion": made[ADDED]}
        save_motion(strip, gif, rows, [f"frame {t}" for t in at], cell_size(self.recipe.data.image_size))
        return _scores(self.tokenizer, made, ~part.scene.reference.moving.to(self.tokenizer.device))

    def scores(self, done: Mapping[str, Scores]) -> dict[str, dict[str, list[list[float]]]]:
        return by_group(done, lambda number: self.parts[number].name, KINDS)

    def figures(self, done: Mapping[str, Scores]) -> list[Figure]:
        return [
            Figure(file, f"{pair.name}: the real motion, and it in the other scene")
            for pair in (self.parts[number] for number in done)
            for file in pair.files
        ]


@torch.no_grad()
def _pictures(tokenizer: Tokenizer, pair: Pair, at: list[int], steps: int) -> dict[str, Tensor]:
    """(T, 3, H, W) each: the real frames and the transferred ones; and (1, 3, H, W) the scene."""
    frames = load(pair.source.held_out, pair.episode, at).to(tokenizer.device)
    scene = load(pair.scene.held_out, pair.scene_episode, [0]).to(tokenizer.device)
    states, begin = tokenizer.encode(frames), tokenizer.encode(scene)
    noise = sampler_noise(tokenizer, [pair.scene.held_out.episodes[pair.scene_episode].start])
    real, ground = to_float(frames), to_float(scene)
    return {
        "real": real,
        "scene": ground,
        ADDED: tokenizer.decode(begin + states - states[:1], steps, noise.expand(len(at), -1, -1, -1)),
        PIXELS: (ground + real - real[:1]).clamp(0, 1),
        STILL: tokenizer.decode(begin, steps, noise).expand(len(at), -1, -1, -1),
    }


def _scores(tokenizer: Tokenizer, made: dict[str, Tensor], still: Tensor) -> Scores:
    """Image row → motion kept, scene kept."""
    asked = _motion(tokenizer, made["real"])
    found = {}
    for kind in KINDS:
        kept = psnr(made[kind], made["scene"].expand_as(made[kind]), still).mean().item()
        moved = _motion(tokenizer, made[kind])
        cosine = float("nan") if kind == STILL else F.cosine_similarity(moved, asked, dim=1).mean().item()
        found[kind] = [cosine, kept]
    return found


def _motion(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    states = tokenizer.encode(images).flatten(1)
    return states[1:] - states[:1]
