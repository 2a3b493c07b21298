"""Motion transfer: the motion of one episode added to the state of another scene, decoded (STAMO §2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from stamo_dist.engine.runfolder import open_run
from stamo_dist.errors import DataError
from stamo_dist.evaluate.common import (
    Figure,
    Result,
    known,
    load_tokenizer,
    output_folder,
    progress,
    read_recipe,
    sampler_noise,
)
from stamo_dist.evaluate.figures import cell_size, file_name, save_gif, save_grid
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, Source, load, open_sources, reference, spread
from stamo_dist.evaluate.metrics import psnr
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer

NAME = "transfer"
ADDED, PIXELS, STILL = KINDS = ("motion added", "pixels added", "scene alone")
_COLUMNS = {
    "source": "motion from → scene of",
    "image": "image",
    "pairs": "pairs",
    "cosine": "motion kept",
    "psnr_still": "scene kept dB",
}
_ABOUT = (
    f"Split {SPLIT!r}, first camera: the motion E(o_t) − E(o_0) of one episode is added to the state of the first "
    "frame of another episode and decoded. motion kept: the decoded pictures are encoded again; cosine of their motion "
    "with the one that was added, mean over the times after the first. scene kept: PSNR against the scene's first "
    "frame over the pixels that are not moving ones. pixels added: the same with pixels for states, no model. "
    f"scene alone: the scene's state decoded at every time. {MOVING_RULE}"
)


@dataclass(frozen=True)
class Pair:
    """Episodes of two scenes."""

    source: Source
    episode: int
    scene: Source
    scene_episode: int

    @property
    def name(self) -> str:
        return f"{self.source.name} → {self.scene.name}"


def transfer(
    run_path: Path,
    *,
    checkpoint: str | None = None,
    pairs: int = 2,
    points: int = 7,
    span: int = 32,
    steps: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Transfer motions between held-out episodes of every two sources, both ways, and within each source.

    `pairs`: of episodes, of each two sources. `points`: pictures of a motion, the first included. `span`: frames the
    motion lasts, at most. `steps`: of the sampler, the recipe's when omitted. Writes RUN/eval/transfer/.

    Raises:
        StamoError: No such run, no checkpoint yet, a source without a held-out split, or no two episodes of 2 frames;
            nothing was written.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = read_recipe(run)
    chosen = _choose(open_sources(recipe), pairs)
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps

    scenes = {pair.scene.name: pair.scene for pair in chosen}
    still = {name: ~reference(scene.train).moving.to(tokenizer.device) for name, scene in scenes.items()}
    scores: dict[str, dict[str, list[list[float]]]] = {}
    figures = []
    with progress(console) as bar:
        watched = bar.add_task("motions", total=len(chosen))
        for number, pair in enumerate(chosen):
            length = pair.source.held_out.episodes[pair.episode].length
            at = sorted({round(i * min(span, length - 1) / (points - 1)) for i in range(points)})
            made = _pictures(tokenizer, pair, at, steps)
            for kind, values in _scores(tokenizer, made, still[pair.scene.name]).items():
                scores.setdefault(pair.name, {}).setdefault(kind, []).append(values)
            stem = file_name(f"{number:02d}_{pair.source.name}_{pair.scene.name}")
            rows, cell = [list(made["real"]), list(made[ADDED])], cell_size(recipe.data.image_size)
            headings, labels = [f"frame {t}" for t in at], [f"{pair.source.name}\nreal", f"{pair.scene.name}\n+ motion"]
            save_grid(folder / f"{stem}.png", rows, headings=headings, labels=labels, cell=cell)
            save_gif(folder / f"{stem}.gif", list(zip(*rows, strict=True)), cell=cell)
            caption = f"{pair.name}: the real motion, and it in the other scene"
            figures += [Figure(f"{stem}.{suffix}", caption) for suffix in ("png", "gif")]
            bar.advance(watched)

    table = []
    for name, kinds in scores.items():
        for kind, measured in kinds.items():
            cosine, kept = torch.tensor(measured, dtype=torch.float64).nanmean(0).tolist()
            means = {"cosine": known(cosine), "psnr_still": known(kept)}
            table.append({"source": name, "image": kind, "pairs": len(measured), **means})
    settings = {"pairs": pairs, "points": points, "span": span, "steps": steps}
    result = Result(
        NAME, "Motion transfer", _ABOUT, _COLUMNS, table, settings, provenance, [], figures,
        by=["source", "image"], better={"cosine": "higher", "psnr_still": "higher"},
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    return result


def _choose(sources: list[Source], pairs: int) -> list[Pair]:
    found = []
    for source in sources:
        moving = [i for i, episode in enumerate(source.held_out.episodes) if episode.length > 1]
        for scene in sources:
            for n, e in enumerate(moving[i] for i in spread(pairs, len(moving))):
                others = [i for i in range(len(scene.held_out)) if scene.name != source.name or i != e]
                if others:
                    found.append(Pair(source, e, scene, others[(e + n) % len(others)]))
    if not found:
        raise DataError("a motion and a scene are two held-out episodes of 2 frames or more; convert more episodes")
    return found


@torch.no_grad()
def _pictures(tokenizer: Tokenizer, pair: Pair, at: list[int], steps: int) -> dict[str, Tensor]:
    """(T, 3, H, W) each: the real frames, what stands for the transfer, and (1, 3, H, W) the scene."""
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


def _scores(tokenizer: Tokenizer, made: dict[str, Tensor], still: Tensor) -> dict[str, list[float]]:
    """Picture → motion kept, scene kept."""
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
