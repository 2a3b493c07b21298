"""Reconstruction of held-out frames, between what a tokenizer must beat (the mean image) and what it can (the VAE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.evaluate.common import (
    Figure,
    Result,
    known,
    load_tokenizer,
    output_folder,
    partial,
    progress,
    read_recipe,
    sampler_noise,
)
from stamo_dist.evaluate.crew import Crew
from stamo_dist.evaluate.figures import cell_size, file_name, save_grid
from stamo_dist.evaluate.held_out import (
    MOVING_RULE,
    SPLIT,
    Pick,
    identity,
    open_sources,
    pick_frames,
    reference,
    spread,
)
from stamo_dist.evaluate.metrics import ALEXNET, LPIPS, psnr, ssim
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.run.folder import open_run

NAME = "reconstruct"
MEAN, TOKENIZER, VAE = KINDS = ("mean image", "reconstruction", "VAE alone")
ORIGINAL = "original"
_DRAWN = (ORIGINAL, VAE, TOKENIZER, MEAN)
_COLUMNS = {
    "source": "source",
    "image": "image",
    "frames": "frames",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "psnr_moving": "moving dB",
    "lpips": "LPIPS",
}
_ABOUT = (
    f"Split {SPLIT!r}, first camera. PSNR, over all and over the moving pixels, and SSIM of each frame; means over the "
    "frames. The VAE alone is the upper bound; the mean image is that of the source's training frames. "
    f"{MOVING_RULE}"
)
_SHOWN = 5  # frames of each source in the picture


def reconstruct(
    run_path: Path,
    *,
    checkpoint: str | None = None,
    frames: int = 128,
    steps: int | None = None,
    batch: int = 32,
    out: Path | None = None,
    console: Console | None = None,
    crew: Crew = Crew(),  # noqa: B008 (frozen)
) -> Result:
    """Measure a run's tokenizer on the held-out frames of its sources and write RUN/eval/reconstruct/.

    `frames`: at most so many of each source, evenly spaced in its episodes. `steps`: of the sampler, the recipe's when
    omitted. `batch`: frames decoded at once; it does not change the result. `out`: another folder to write to. `crew`:
    processes that measure together; the first writes. Started again after a kill it goes on.

    Raises:
        StamoError: No such run, no checkpoint yet, or a source without a held-out split; nothing was written.
    """
    console = crew.console(console)
    run = open_run(run_path)
    recipe = read_recipe(run)
    opened = open_sources(recipe)
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps
    perceptual = LPIPS.at_hand(tokenizer.device)

    sources = {source.name: source for source in opened}
    picks = {name: pick_frames(source.held_out, frames) for name, source in sources.items()}
    parts = {
        f"{name}/{first}": (name, chosen[first : first + batch])
        for name, chosen in picks.items()
        for first in range(0, len(chosen), batch)
    }
    settings = {"frames": frames, "steps": steps}
    lpips = {"batch": batch, "lpips": perceptual is not None}
    trials = crew.trials(folder, NAME, identity(tokenizer, opened, settings | lpips))

    @cache
    def baseline(name: str) -> tuple[Tensor, Tensor]:
        stats = reference(sources[name].train)
        return stats.mean.to(tokenizer.device), stats.moving.to(tokenizer.device)

    def make(name: str, chunk: Sequence[Pick]) -> dict[str, Tensor]:
        images = sources[name].images(chunk).to(tokenizer.device)
        return pictures(tokenizer, images, chunk, baseline(name)[0], steps)

    def measure(part: tuple[str, Sequence[Pick]]) -> dict[str, list[list[float]]]:
        made = make(*part)
        moving = baseline(part[0])[1]
        return {kind: _scores(made[kind], made[ORIGINAL], moving, perceptual).tolist() for kind in KINDS}

    @cache
    def draw(name: str) -> Figure:
        chosen, source, file = picks[name], sources[name], file_name(name, "png")
        if crew.main:
            shown = [chosen[i] for i in spread(_SHOWN, len(chosen))]
            made = [make(name, shown[first : first + batch]) for first in range(0, len(shown), batch)]
            drawn = [[image for part in made for image in part[kind].cpu()] for kind in _DRAWN]
            # The whole id would be wider than the pictures.
            labels = [f"…{source.held_out.episodes[p.episode].id[-24:]}\nframe {p.t}" for p in shown]
            cell = cell_size(recipe.data.image_size)
            save_grid(folder / file, list(zip(*drawn, strict=True)), headings=_DRAWN, labels=labels, cell=cell)
        return Figure(file, f"{name}, camera {source.camera}: held-out frames, {steps} sampler steps")

    result: Result

    def tell(done: dict[str, dict[str, list[list[float]]]]) -> None:
        nonlocal result
        tables: dict[str, dict[str, list[list[float]]]] = {}
        for name in [*sources, *(["all"] if len(sources) > 1 else [])]:
            found = [scores for part, scores in done.items() if name in (parts[part][0], "all")]
            if found:
                tables[name] = {kind: [row for scores in found for row in scores[kind]] for kind in KINDS}
        rows = [_row(name, kind, tables[name][kind]) for name in tables for kind in KINDS]
        count = {name: len(tables[name][VAE]) for name in sources if name in tables}
        for name, n in count.items():
            bar.update(watched[name], completed=n)
        whole = [name for name, n in count.items() if n == len(picks[name])]
        everything = sum(map(len, picks.values()))
        result = Result(
            NAME, "Reconstruction of held-out frames", _ABOUT, _COLUMNS, rows, settings, provenance,
            _notes(rows, perceptual), [draw(name) for name in whole], by=["source", "image"],
            better={"psnr": "higher", "ssim": "higher", "psnr_moving": "higher", "lpips": "lower"},
            partial=partial(sum(count.values()), everything, "frames"),
        )  # fmt: skip
        if crew.main:
            result.write(folder)

    with progress(console) as bar:
        watched = {name: bar.add_task(name, total=len(chosen)) for name, chosen in picks.items()}
        crew.rounds(trials, parts, measure, tell)
    trials.close()
    result.show(console, folder)
    return result


def pictures(
    tokenizer: Tokenizer, images: Tensor, picks: Sequence[Pick], mean: Tensor, steps: int
) -> dict[str, Tensor]:
    """Of uint8 frames (B, H, W, 3): themselves and what stands for them, float (B, 3, H, W) in [0, 1] each."""
    samples = [pick.sample for pick in picks]
    posterior = sampler_noise(tokenizer, samples, stream=2)  # read only where the recipe samples the posterior
    with torch.no_grad():
        through_vae = tokenizer.vae.decode(tokenizer.latents(images, noise=posterior))
    decoded = tokenizer.decode(tokenizer.encode(images), steps, sampler_noise(tokenizer, samples))
    return {ORIGINAL: to_float(images), VAE: through_vae, TOKENIZER: decoded, MEAN: mean.expand_as(decoded)}


def _scores(images: Tensor, truth: Tensor, moving: Tensor, perceptual: LPIPS | None) -> Tensor:
    """(B, 4) float64: PSNR, SSIM, PSNR over the moving pixels, LPIPS (NaN without its weights)."""
    columns = [psnr(images, truth), ssim(images, truth), psnr(images, truth, moving)]
    columns.append(torch.full_like(columns[0], torch.nan) if perceptual is None else perceptual(images, truth))
    return torch.stack(columns, 1).to("cpu", torch.float64)


def _row(source: str, kind: str, table: Sequence[Sequence[float]]) -> dict[str, object]:
    values = [known(value) for value in torch.tensor(table, dtype=torch.float64).nanmean(0).tolist()]
    scores = dict(zip(("psnr", "ssim", "psnr_moving", "lpips"), values, strict=True))
    return {"source": source, "image": kind, "frames": len(table), **scores}


def _notes(rows: Sequence[dict[str, object]], perceptual: LPIPS | None) -> list[str]:
    notes = []
    if perceptual is None:
        notes.append(
            f"LPIPS: not measured, AlexNet's weights are not at hand; put download.pytorch.org/models/{ALEXNET} at "
            f"{LPIPS.weights()}"
        )
    for group in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        mean, ours, vae = (row["psnr_moving"] for row in group)
        if isinstance(mean, float) and isinstance(ours, float) and isinstance(vae, float):
            notes.append(
                f"{group[0]['source']}: {ours:.2f} dB over the moving pixels, {ours - mean:+.2f} dB against the mean "
                f"image ({mean:.2f}); the VAE alone reaches {vae:.2f}"
            )
    return notes
