"""The paper's four rows of co-training on a recipe of the diffusion policy, by held-out action error: a toy.

    python benchmarks/rdt_video.py recipes/policy_rdt_1real_4video_demo.yaml [--seeds 2] [--steps 500] [--frames 355]

Every row trains the same network for the same steps on the same frames in the same order. `all real` reads the actions
of every episode, the others those of every fifth; the remaining four fifths are left out, or teach StaMo's motion, or
as many numbers of pixel difference. Held-out action error stands for the success rate, which needs a simulator and more
data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stamo_dist.recipe.load import load

ARMS = {
    "all real": (1.0, "none"),
    "1 real": (0.2, "none"),
    "1 real + 4 StaMo motion": (0.2, "motion"),
    "1 real + 4 pixel difference": (0.2, "pixels"),
}


def stamo(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stamo_dist.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/policy_rdt_1real_4video_demo.yaml")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int, default=355, help="most held-out frames of a source")
    parser.add_argument("--out", type=Path, help="keep the runs here; a run that has ended is not trained again")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    options = parser.parse_args()
    recipe = load(options.recipe, options.set).recipe
    steps = options.steps or recipe.train.steps
    needless = recipe.policy.stamo != "states"  # without a pseudo-action nothing else reads the cache
    labelled = [name for name, source in recipe.data.used.items() if source.actions]
    rows: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in ARMS}
    with (
        tempfile.TemporaryDirectory(prefix="stamo-benchmark-") as scratch,
        Progress(console=Console(stderr=True)) as bar,
    ):
        if recipe.policy.targets == "cached":
            stamo("encode", options.recipe, *(x for setting in options.set for x in ("--set", setting)))
        task = bar.add_task("training", total=options.seeds * len(ARMS))
        for seed in range(options.seeds):
            for arm, (share, pseudo) in ARMS.items():
                run = (options.out or Path(scratch)) / f"{arm.replace(' ', '_')}-{seed}"
                settings = [
                    *options.set, f"run_dir={run}", f"seed={seed}", f"train.steps={steps}",
                    *(f"data.sources.{name}.labelled={share}" for name in labelled),
                    f"policy.diffusion.pseudo={pseudo}",
                    *(["policy.targets=online"] if pseudo == "pixels" or (needless and pseudo == "none") else []),
                ]  # fmt: skip
                stamo("train", options.recipe, *(x for setting in settings for x in ("--set", setting)))
                stamo("eval", "actions", run, "--frames", options.frames)
                rows[arm].append(json.loads((run / "eval/actions/actions.json").read_text())["rows"])
                bar.advance(task)
    title = f"{recipe.name}, {steps} steps, {options.seeds} seeds: held-out error of normalised actions (a toy)"
    table = Table(title=title, caption="the mean action's error is what a policy that sees nothing reaches")
    for column in ("", "mean |error|", "seeds", "first action", "root mean square", "mean action"):
        table.add_column(column, justify="right" if column else "left")
    for arm, seeds in rows.items():
        mean = {
            key: [statistics.mean(row[key] for row in found) for found in seeds]
            for key in ("mae", "first", "rmse", "baseline")
        }
        table.add_row(
            arm, f"{statistics.mean(mean['mae']):.4f}", " ".join(f"{x:.4f}" for x in mean["mae"]),
            f"{statistics.mean(mean['first']):.4f}", f"{statistics.mean(mean['rmse']):.4f}",
            f"{statistics.mean(mean['baseline']):.4f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
