"""How well hand and cube can be read, linearly, from what `stamo eval plan` plans with: errors in cm, ManiSkill.

python benchmarks/where_things_are.py [--run demo/runs/tokenizer_maniskill]

After `python benchmarks/one_policy.py maniskill`. Every third frame of the shards' training episodes, of which every
fifth is held out of a ridge regression on the simulator's own positions; its penalty is the best of five on those.
A grasp asks for about a centimetre: the fingers open 8 cm, the cube is 4 cm wide.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stamo_dist.data.frames import Episodes
from stamo_dist.evaluate.features import Representations
from stamo_dist.evaluate.weights import load_tokenizer
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run

TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1")
CUBE = slice(13, 15)  # of env_states/flat: x and y of the first cube, behind the table's 13 numbers
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo/runs/tokenizer_maniskill", help="(%(default)s)")
    parser.add_argument("--shards", default="demo/shards/maniskill", help="(%(default)s)")
    parser.add_argument("--raw", type=Path, default=Path("demo/raw/maniskill"), help="(%(default)s)")
    options = parser.parse_args()
    run = open_run(options.run)
    tokenizer, _ = load_tokenizer(run, load(run.resolved).recipe)
    episodes = Episodes(options.shards, "train")
    some = np.concatenate([episodes.frames(i, [0]) for i in range(0, len(episodes), 20)])
    represent = Representations(tokenizer, torch.from_numpy(some), patch_dim=4096)
    table, lines = Table(title="Error of hand / cube in cm"), dict[str, list[str]]()
    for task in TASKS:
        rows, places, numbers = read(task, episodes, represent, options.raw)
        held_out = np.isin(numbers, np.unique(numbers)[::5])
        for name, row in rows.items():
            errors = (100 * error(row, place, held_out) for place in places)
            lines.setdefault(name, []).append(" / ".join(f"{e:.1f}" for e in errors))
    for column in ("", *TASKS):
        table.add_column(column, justify="right" if column else "left")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console().print(table)


Array = NDArray[np.float64]


def read(
    task: str, episodes: Episodes, represent: Representations, raw: Path
) -> tuple[dict[str, Array], tuple[Array, Array], NDArray[np.int64]]:
    """Representation → its rows; where hand (n, 3) and cube (n, 2) are, in metres; each row's episode."""
    rows: dict[str, list[Array]] = {"nothing (their mean)": []}
    hand, cube, numbers = [], [], []
    with h5py.File(raw / f"{task}.h5") as file:
        mine = [i for i, e in enumerate(episodes.episodes) if e.task == task]
        for i in track(mine, task, console=Console(stderr=True), transient=True):
            found = episodes.episodes[i]
            moments = list(range(0, found.length, 3))
            for name, row in represent(torch.from_numpy(episodes.frames(i, moments))).items():
                rows.setdefault(name, []).append(row.double().numpy())
            rows["nothing (their mean)"].append(np.zeros((len(moments), 1)))
            group = file[found.id.rpartition("/")[2]]
            hand.append(group["obs/extra/tcp_pose"][moments][:, :3])
            cube.append(group["env_states/flat"][moments][:, CUBE])
            numbers += [i] * len(moments)
    joined = {name: np.concatenate(parts) for name, parts in rows.items()}
    return joined, (np.concatenate(hand), np.concatenate(cube)), np.array(numbers)


def error(rows: Array, places: Array, held_out: NDArray[np.bool_]) -> float:
    """Root mean square distance between what a ridge regression reads and what is, in metres."""
    known = ~held_out
    rows = (rows - rows[known].mean(0)) / (rows[known].std(0) + 1e-6)
    mean = places[known].mean(0)
    left, values, right = np.linalg.svd(rows[known], full_matrices=False)
    found = []
    for penalty in PENALTIES:
        weights = right.T @ ((values / (values**2 + penalty))[:, None] * (left.T @ (places[known] - mean)))
        wrong = rows[held_out] @ weights + mean - places[held_out]
        found.append(float(np.sqrt((wrong**2).sum(1).mean())))
    return min(found)


if __name__ == "__main__":
    main()
