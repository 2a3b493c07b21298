"""How often a run's ranks ask the shared disk: at the start, a save, a beat of the watchdog and the end.

python benchmarks/metadata_ops.py [--worlds 4 8] [--node 2] [--strategy fsdp] [--steps 12] [--sources 2]

Trains a toy recipe on some processes (gloo, no GPU), each under strace, as if every `--node` of them were a node, and
counts the calls that name a path in the folder of sources, weights and run, and the reads of its folders. What rank 0,
the first rank of another node and any other does (medians) is drawn out linearly from the two worlds to `--to` ranks on
nodes of eight; what grew by less than four stays, as it depends on who comes first. A shared disk sees the sum.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from toy import make_source, make_vae, write_recipe

PARTS = ("start", "step", "save", "beat", "end")
ROLES = ("rank 0", "first of a node", "another")
MARK = "/metadata-ops/"  # looked for, so that strace shows what a thread begins
PHASES = {"building": "start", "saving": "save", "exporting": "end", "leaving": "end"}
CHANCE = 4  # operations
EVERY = 4  # steps from one save to the next


def rank(recipe: str) -> None:
    """One rank, which says to strace where it is."""
    from stamo_dist.cli import app
    from stamo_dist.faults.heartbeats import Heartbeats
    from stamo_dist.faults.watchdog import Watchdog

    mark, beat = Watchdog.mark, Heartbeats.beat

    def marked(self: Watchdog, doing: str, step: int) -> None:
        os.path.exists(MARK + PHASES.get(doing.split(maxsplit=1)[0], "step"))
        mark(self, doing, step)

    def beaten(self: Heartbeats, mine: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # which beats once, when all have met
            os.path.exists(MARK + "beat")
        beat(self, mine)

    Watchdog.mark, Heartbeats.beat = marked, beaten  # type: ignore[method-assign]
    sys.argv = ["stamo", "train", recipe]
    app.main()


def train(root: Path, world: int, node: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Of each rank, operations at the start and end, and of a step, a save and a beat."""
    recipe = write_recipe(root / f"{world}" / "toy.yaml", root, root / "vae", strategy=options.strategy)
    text = recipe.read_text().replace("every: 10, keep: 2", f"every: {EVERY}, keep: 2")
    for name in source_names(options.sources)[2:]:
        text = text.replace("  sources:\n", f"  sources:\n    {name}: {{path: {root / name}}}\n")
    recipe.write_text(text.replace("steps: 20", f"steps: {options.steps}").replace("micro_batch: 2", "micro_batch: 1"))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000 + world)}
    processes = []
    for number in range(world):
        place = {"RANK": number, "WORLD_SIZE": world, "LOCAL_RANK": number % node, "LOCAL_WORLD_SIZE": node}
        command = ["strace", "-f", "--seccomp-bpf", "-y", "-qq", "-e", "trace=%file,getdents64"]
        command += ["-o", str(root / f"trace-{world}-{number}"), sys.executable, __file__, "--recipe", str(recipe)]
        env = {**environment, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
        with (root / f"log-{world}-{number}").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    codes = [process.wait() for process in processes]
    if any(codes):
        logs = [(root / f"log-{world}-{number}").read_text()[-2000:] for number in range(world) if codes[number]]
        raise SystemExit(f"{world} processes left with {codes}:\n" + "\n".join(logs))
    return [count(root / f"trace-{world}-{number}", root, options.steps) for number in range(world)]


def count(trace: Path, root: Path, steps: int) -> dict[str, float]:
    found, beats, beating, part = Counter[str](), 0, set[str](), "start"
    with trace.open(errors="replace") as lines:
        for line in lines:
            thread = line.split(maxsplit=1)[0]
            if MARK in line:
                begun = line.split(MARK, maxsplit=1)[1].split('"', maxsplit=1)[0]
                if begun == "beat":
                    beats += 1
                    beating.add(thread)
                else:
                    part = begun
            elif str(root) in line and "<... " not in line and '"", {' not in line and " execve(" not in line:
                saved = part == "step" and "/checkpoints" in line  # in a thread of its own
                found["beat" if thread in beating else "save" if saved else part] += 1
    times = {"step": steps, "save": steps // EVERY, "beat": max(1, beats)}
    return {name: found[name] / times.get(name, 1) for name in PARTS}


def source_names(count: int) -> list[str]:
    return [*"ab", *(f"more{n}" for n in range(2, count))]


def by_role(ranks: list[dict[str, float]], node: int) -> dict[str, dict[str, float]]:
    """Medians over the ranks of each role."""
    of = {ROLES[0]: ranks[:1], ROLES[1]: ranks[node::node]}
    of[ROLES[2]] = [one for number, one in enumerate(ranks) if number % node]
    return {role: {part: statistics.median(r[part] for r in some) for part in PARTS} for role, some in of.items()}


def drawn_out(worlds: Mapping[int, dict[str, dict[str, float]]], to: int) -> dict[str, dict[str, float]]:
    (few, a), (more, b) = min(worlds.items()), max(worlds.items())
    grew = {role: {part: b[role][part] - a[role][part] for part in PARTS} for role in ROLES}
    slope = (to - more) / (more - few)
    return {
        role: {part: b[role][part] + (slope * grew[role][part] if grew[role][part] >= CHANCE else 0) for part in PARTS}
        for role in ROLES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs=2, default=[4, 8])
    parser.add_argument("--node", type=int, default=2, help="Ranks of a node.")
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--steps", type=int, default=3 * EVERY)
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--to", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="Where the traces stay; an empty one.")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recipe:
        return rank(options.recipe)
    found = {}
    with tempfile.TemporaryDirectory(prefix="stamo-benchmark-") as folder:
        root = (options.folder or Path(folder)).resolve()
        for name in source_names(options.sources):
            make_source(root, name)
        make_vae(root / "vae")
        for world in options.worlds:
            found[world] = by_role(train(root, world, options.node, options), options.node)
    what = f"{options.strategy}, {options.sources} sources: operations on the shared disk"
    table = Table(title=f"{what}; of a step, a save and a beat one each")
    for column in ("", *PARTS):
        table.add_column(column, justify="right" if column else "left")
    for world, roles in found.items():
        for role in ROLES:
            table.add_row(f"{world} ranks, {role}", *(f"{roles[role][part]:.1f}" for part in PARTS))
        table.add_section()
    far, nodes = drawn_out(found, options.to), options.to // 8
    for role in ROLES:
        table.add_row(f"{options.to:,} ranks, {role}", *(f"{far[role][part]:.1f}" for part in PARTS))
    numbers = dict(zip(ROLES, (1, nodes - 1, options.to - nodes), strict=True))
    total = {part: sum(numbers[role] * far[role][part] for role in ROLES) for part in PARTS}
    table.add_row(f"{options.to:,} ranks, together", *(f"{total[part]:,.0f}" for part in PARTS))
    table.add_row("of it a rank", *(f"{total[part] / options.to:.1f}" for part in PARTS))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
