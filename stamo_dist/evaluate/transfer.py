"""Motion transfer: the motion of one episode added to the state of another scene, decoded (STAMO §2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from stamo_dist.errors import DataError
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
from stamo_dist.evaluate.figures import cell_size, file_name, save_gif, save_grid
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, Source, identity, load, open_sources, reference, spread
from stamo_dist.evaluate.metrics import psnr
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.run.folder import open_run

NAME = "transfer"
ADDED, PIXELS, STILL = KINDS = ("motion added", "pixels added", "scene alone")
Scores = dict[str, list[float]]
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

    number: int
    source: Source
    episode: int
    scene: Source
    scene_episode: int

    @property
    def name(self) -> str:
        return f"{self.source.name} → {self.scene.name}"

    @property
    def files(self) -> tuple[str, str]:
        """The strip and the loop."""
        stem = file_name(f"{self.number:02d}_{self.source.name}_{self.scene.name}")
        return f"{stem}.png", f"{stem}.gif"


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
    crew: Crew = Crew(),  # noqa: B008 (frozen)
) -> Result:
    """Transfer motions between held-out episodes of every two sources, both ways, and within each source.

    `pairs`: of episodes, of each two sources. `points`: pictures of a motion, the first included. `span`: frames the
    motion lasts, at most. `steps`: of the sampler, the recipe's when omitted. Writes RUN/eval/transfer/. `crew`:
    processes that measure together; the first writes the table. Started again after a kill it goes on.

    Raises:
        StamoError: No such run, no checkpoint yet, a source without a held-out split, or no two episodes of 2 frames;
            nothing was written.
    """
    console = crew.console(console)
    run = open_run(run_path)
    recipe = read_recipe(run)
    sources = open_sources(recipe)
    parts = {str(number): pair for number, pair in enumerate(_choose(sources, pairs))}
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps
    settings = {"pairs": pairs, "points": points, "span": span, "steps": steps}
    trials = crew.trials(folder, NAME, identity(tokenizer, sources, settings))
    training = {source.name: source.train for source in sources}
    still = cache(lambda name: ~reference(training[name]).moving.to(tokenizer.device))

    def measure(pair: Pair) -> Scores:
        length = pair.source.held_out.episodes[pair.episode].length
        at = sorted({round(i * min(span, length - 1) / (points - 1)) for i in range(points)})
        made = _pictures(tokenizer, pair, at, steps)
        rows, cell = [list(made["real"]), list(made[ADDED])], cell_size(recipe.data.image_size)
        headings, labels = [f"frame {t}" for t in at], [f"{pair.source.name}\nreal", f"{pair.scene.name}\n+ motion"]
        strip, gif = (folder / file for file in pair.files)
        save_grid(strip, rows, headings=headings, labels=labels, cell=cell)
        save_gif(gif, list(zip(*rows, strict=True)), cell=cell)
        return _scores(tokenizer, made, still(pair.scene.name))

    result: Result

    def tell(done: dict[str, Scores]) -> None:
        nonlocal result
        bar.update(watched, completed=len(done))
        there = [parts[number] for number in done]
        rows = [
            _row(name, kind, [scores[kind] for number, scores in done.items() if parts[number].name == name])
            for name in dict.fromkeys(pair.name for pair in there)
            for kind in KINDS
        ]
        figures = [
            Figure(file, f"{pair.name}: the real motion, and it in the other scene")
            for pair in there
            for file in pair.files
        ]
        result = Result(
            NAME, "Motion transfer", _ABOUT, _COLUMNS, rows, settings, provenance, [], figures,
            by=["source", "image"], better={"cosine": "higher", "psnr_still": "higher"},
            partial=partial(len(done), len(parts), "pairs"),
        )  # fmt: skip
        if crew.main:
            result.write(folder)

    with progress(console) as bar:
        watched = bar.add_task("motions", total=len(parts))
        crew.rounds(trials, parts, measure, tell)
    trials.close()
    result.show(console, folder)
    return result


def _row(name: str, kind: str, measured: Sequence[Sequence[float]]) -> dict[str, object]:
    cosine, kept = torch.tensor(measured, dtype=torch.float64).nanmean(0).tolist()
    means = {"cosine": known(cosine), "psnr_still": known(kept)}
    return {"source": name, "image": kind, "pairs": len(measured), **means}


def _choose(sources: list[Source], pairs: int) -> list[Pair]:
    found: list[Pair] = []
    for source in sources:
        moving = [i for i, episode in enumerate(source.held_out.episodes) if episode.length > 1]
        for scene in sources:
            for n, e in enumerate(moving[i] for i in spread(pairs, len(moving))):
                others = [i for i in range(len(scene.held_out)) if scene.name != source.name or i != e]
                if others:
                    found.append(Pair(len(found), source, e, scene, others[(e + n) % len(others)]))
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


def _scores(tokenizer: Tokenizer, made: dict[str, Tensor], still: Tensor) -> Scores:
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
