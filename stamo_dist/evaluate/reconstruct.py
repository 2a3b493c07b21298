"""Reconstruction of held-out frames, compared with a lower bound (the mean image) and an upper bound (the VAE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from stamo_dist.evaluate.figures import cell_size, file_name, save_grid
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, Pick, pick_frames, spread
from stamo_dist.evaluate.measurement import PartwiseMeasurement
from stamo_dist.evaluate.metrics import ALEXNET, LPIPS, psnr, ssim
from stamo_dist.evaluate.options import ReconstructOptions
from stamo_dist.evaluate.result import Figure
from stamo_dist.evaluate.weights import sampler_noise
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer

MEAN, TOKENIZER, VAE = KINDS = ("mean image", "reconstruction", "VAE alone")
ORIGINAL = "original"
_DRAWN = (ORIGINAL, VAE, TOKENIZER, MEAN)
_SHOWN = 5  # frames of each source in the figure
Batch = tuple[str, Sequence[Pick]]  # (name of a source, frames of it)
Scores = dict[str, list[list[float]]]  # image row → PSNR, SSIM, PSNR over the moving pixels and LPIPS of each frame


class Reconstruction(ReconstructOptions, PartwiseMeasurement[Batch, Scores]):
    """Scores of reconstructed frames; independent of `batch`. A part is a batch of one source's frames."""

    name = "reconstruct"
    title = "Reconstruction of held-out frames"
    about = (
        f"Split {SPLIT!r}, first camera. PSNR, over all and over the moving pixels, and SSIM of each frame; means over "
        "the frames. The VAE alone is the upper bound; the mean image is that of the source's training frames. "
        f"{MOVING_RULE}"
    )
    columns: ClassVar = {
        "source": "source",
        "image": "image",
        "frames": "frames",
        "psnr": "PSNR dB",
        "ssim": "SSIM",
        "psnr_moving": "moving dB",
        "lpips": "LPIPS",
    }
    by = ("source", "image")
    better: ClassVar = {"psnr": "higher", "ssim": "higher", "psnr_moving": "higher", "lpips": "lower"}
    noun = "frames"
    unrecorded = ("batch",)

    def select(self) -> None:
        self._picks = {name: pick_frames(source.held_out, self.frames) for name, source in self.sources.items()}
        self.parts = {
            f"{name}/{first}": (name, picks[first : first + self.batch])
            for name, picks in self._picks.items()
            for first in range(0, len(picks), self.batch)
        }
        self._figures: dict[str, Figure] = {}

    @cached_property
    def _perceptual(self) -> LPIPS | None:
        return LPIPS.at_hand(self.tokenizer.device)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "batch": self.batch, "lpips": self._perceptual is not None}

    def count(self, part: Batch) -> int:
        return len(part[1])

    def _pictures(self, name: str, picks: Sequence[Pick]) -> dict[str, Tensor]:
        images = self.sources[name].images(picks).to(self.tokenizer.device)
        mean = self.sources[name].reference.mean.to(self.tokenizer.device)
        return pictures(self.tokenizer, images, picks, mean, self.sampler_steps)

    def measure(self, part: Batch) -> Scores:
        made, moving = self._pictures(*part), self.sources[part[0]].reference.moving.to(self.tokenizer.device)
        return {kind: _scores(made[kind], made[ORIGINAL], moving, self._perceptual).tolist() for kind in KINDS}

    def scores(self, done: Mapping[str, Scores]) -> dict[str, Scores]:
        found = {}
        for name in [*self.sources, *(["all"] if len(self.sources) > 1 else [])]:
            if values := [scores for key, scores in done.items() if name in (self.parts[key][0], "all")]:
                found[name] = {kind: [row for scores in values for row in scores[kind]] for kind in KINDS}
        return found

    def figures(self, done: Mapping[str, Scores]) -> list[Figure]:
        """Figures of every source whose frames are all measured."""
        left = {self.parts[key][0] for key in self.parts.keys() - done.keys()}
        return [self._draw(name) for name in self.sources if name not in left]

    def _draw(self, name: str) -> Figure:
        if name not in self._figures:
            source, file = self.sources[name], file_name(name, "png")
            if self.group.main:
                picks = [self._picks[name][i] for i in spread(_SHOWN, len(self._picks[name]))]
                made = [self._pictures(name, picks[i : i + self.batch]) for i in range(0, len(picks), self.batch)]
                drawn = [[image for part in made for image in part[kind].cpu()] for kind in _DRAWN]
                # The full id would be wider than the images.
                labels = [f"…{source.held_out.episodes[p.episode].id[-24:]}\nframe {p.t}" for p in picks]
                grid, cell = list(zip(*drawn, strict=True)), cell_size(self.recipe.data.image_size)
                save_grid(self.folder / file, grid, headings=_DRAWN, labels=labels, cell=cell)
            caption = f"{name}, camera {source.camera}: held-out frames, {self.sampler_steps} sampler steps"
            self._figures[name] = Figure(file, caption)
        return self._figures[name]

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        notes = []
        if self._perceptual is None:
            notes.append(
                f"LPIPS: not measured, AlexNet's weights are not at hand; put download.pytorch.org/models/{ALEXNET} at "
                f"{LPIPS.weights()}"
            )
        for group in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
            mean, ours, vae = (row["psnr_moving"] for row in group)
            if None not in (mean, ours, vae):
                notes.append(
                    f"{group[0]['source']}: {ours:.2f} dB over the moving pixels, {ours - mean:+.2f} dB against the "
                    f"mean image ({mean:.2f}); the VAE alone reaches {vae:.2f}"
                )
        return notes


def pictures(
    tokenizer: Tokenizer, images: Tensor, picks: Sequence[Pick], mean: Tensor, steps: int
) -> dict[str, Tensor]:
    """For uint8 frames (B, H, W, 3): the frames and their reconstructions, each float (B, 3, H, W) in [0, 1]."""
    samples = [pick.sample for pick in picks]
    posterior = sampler_noise(tokenizer, samples, stream=2)  # used only if the recipe samples the posterior
    with torch.no_grad():
        through_vae = tokenizer.vae.decode(tokenizer.latents(images, noise=posterior))
    decoded = tokenizer.decode(tokenizer.encode(images), steps, sampler_noise(tokenizer, samples))
    return {ORIGINAL: to_float(images), VAE: through_vae, TOKENIZER: decoded, MEAN: mean.expand_as(decoded)}


def _scores(images: Tensor, truth: Tensor, moving: Tensor, perceptual: LPIPS | None) -> Tensor:
    """(B, 4) float64: PSNR, SSIM, PSNR over the moving pixels, LPIPS (NaN without its weights)."""
    columns = [psnr(images, truth), ssim(images, truth), psnr(images, truth, moving)]
    columns.append(torch.full_like(columns[0], torch.nan) if perceptual is None else perceptual(images, truth))
    return torch.stack(columns, 1).to("cpu", torch.float64)
