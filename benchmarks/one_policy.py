"""One policy for many tasks, from simulation to success rates, beside random actions and the scripted expert: a toy.

    python benchmarks/one_policy.py metaworld          # ten tasks; after `make demo`, whose tokenizer it sees through
    python benchmarks/one_policy.py libero_spatial     # ten tasks that differ by their instructions; then shuffled
    python benchmarks/one_policy.py maniskill          # four cube tasks; after `make maniskill`

Every step is a command that goes on where it was stopped, and is printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    benchmark: str
    source: str  # also the folder's name
    tasks: str
    episodes: int
    camera: str
    recipe: str
    trials: int
    shuffled: bool = False
    vae: str | None = None  # recipes of a tokenizer of its own
    tokenizer: str | None = None


SUITES = {
    "metaworld": Suite(
        "metaworld", "metaworld10",
        "drawer-open-v3,drawer-close-v3,button-press-topdown-v3,door-open-v3,window-open-v3,window-close-v3,"
        "faucet-open-v3,faucet-close-v3,handle-press-v3,button-press-v3",
        30, "corner3", "recipes/policy_metaworld10_demo.yaml", 20,
    ),
    "libero_spatial": Suite(
        "libero", "libero_spatial", "libero_spatial", 20, "agentview", "recipes/policy_libero_spatial_demo.yaml", 10,
        shuffled=True, vae="recipes/vae_libero_spatial_demo.yaml",
        tokenizer="recipes/tokenizer_libero_spatial_demo.yaml",
    ),
    "maniskill": Suite(
        "maniskill", "maniskill", "PushCube-v1,PullCube-v1,PickCube-v1,StackCube-v1", 100, "base_camera",
        "recipes/policy_maniskill_demo.yaml", 50, vae="recipes/vae_maniskill_demo.yaml",
        tokenizer="recipes/tokenizer_maniskill_demo.yaml",
    ),
}  # fmt: skip


def stamo(line: str) -> None:
    print(f"$ stamo {line}", flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "stamo_dist.cli", *shlex.split(line)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"  took {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--nproc", type=int, default=2, help="processes of the training")
    parser.add_argument("--trials", type=int, help="of each task")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the recipe")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    raw, shards = f"demo/raw/{suite.source}", f"demo/shards/{suite.source}"
    settings = shlex.join(x for setting in options.set for x in ("--set", setting))
    stamo(
        f"data simulate {suite.benchmark} {raw} --tasks {suite.tasks} --episodes {suite.episodes} --size 128 "
        f"--cameras {suite.camera}"
    )
    stamo(f"data convert {suite.benchmark} {raw} {shards} --size 64 --val-fraction 0.1")
    stamo(f"data stats {shards}")
    if suite.vae and suite.tokenizer:
        stamo(f"train {suite.vae}")
        stamo(f"encode {suite.tokenizer}")
        stamo(f"train {suite.tokenizer} --nproc {options.nproc}")
    stamo(f"encode {suite.recipe} {settings}")
    stamo(f"train {suite.recipe} --nproc {options.nproc} {settings}")
    from stamo_dist.recipe.load import load

    run = load(suite.recipe, options.set).recipe.run_dir
    trials = options.trials or suite.trials
    stamo(f"eval rollout {shlex.quote(run)} --tasks {suite.tasks} --trials {trials} --baselines")
    if suite.shuffled:
        out = shlex.quote(f"{run}/eval/rollout_shuffled")
        stamo(
            f"eval rollout {shlex.quote(run)} --tasks {suite.tasks} --trials {trials} --shuffle-instructions "
            f"--out {out}"
        )


if __name__ == "__main__":
    main()
