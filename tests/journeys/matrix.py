"""Walk every journey and every pair of options, and print the tables of docs/scale.md (`make test-matrix`)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pairs
from forked import Ranks
from journey import STRATEGIES, Variant, Walked, straight, variants, walk
from rich.progress import track
from toy import make_source, make_vae
from toy_policy import make_base, make_policy_data


class Results:
    """What was found, by name; kept in a file, so that another start goes on."""

    def __init__(self, path: Path):
        self._path, self.found = path, dict[str, dict[str, object]]()
        if path.exists():
            self.found = {line["name"]: line for line in map(json.loads, path.read_text().splitlines())}

    def get(self, name: str, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
        if name not in self.found:
            self.found[name] = {"name": name, **measure()}
            with self._path.open("a") as file:
                file.write(json.dumps(self.found[name]) + "\n")
        return self.found[name]


def journeys(ranks: Ranks, every: dict[str, Variant], results: Results, room: Path, only: str) -> list[Walked]:
    names = [name for name in every if only in name]
    todo = [(name, strategy, n) for name in names for strategy in STRATEGIES for n in (1, 2, 3)]
    out, expected = [], dict[str, list[float]]()
    for name, strategy, n in track(todo, "journeys"):

        def measure(name: str = name, strategy: str = strategy, n: int = n) -> dict[str, object]:
            if name not in expected:
                expected[name] = straight(ranks, every[name], _fresh(room / "straight"))
            return asdict(walk(ranks, name, every[name], strategy, n, _fresh(room / "walked"), expected[name]))

        found = results.get(f"{name} | {strategy} | {n}", measure)
        out.append(Walked(**{k: v for k, v in found.items() if k != "name"}))  # type: ignore[arg-type]
        if out[-1].problem:
            print(f"{name} | {strategy} | {n}: {out[-1].problem}", file=sys.stderr)
    return out


def all_pairs(ranks: Ranks, toys: pairs.Toys, results: Results, room: Path, only: str) -> dict[str, list[str]]:
    """Stage → the problem of each run and refusal; "" where there is none."""
    toys.encode(ranks, _fresh(room / "encoded"))
    todo = [(stage, row, None) for stage in pairs.OPTIONS for row in pairs.rows(stage)]
    todo += [(stage, row, field) for stage in pairs.OPTIONS for row, field in pairs.refused(stage)]
    out: dict[str, list[str]] = {stage: [] for stage in pairs.OPTIONS}
    for stage, row, field in track([t for t in todo if only in t[0]], "pairs of options"):
        name = f"{stage}: " + ", ".join(f"{option} {value}" for option, value in row.items())

        def measure(stage: str = stage, row: pairs.Row = row, field: str | None = field) -> dict[str, object]:
            folder = _fresh(room / "pair")
            if field is None:
                return {"problem": pairs.run(ranks, toys, stage, row, folder)}
            return {"problem": pairs.refuse(ranks, toys, stage, row, field, folder)}

        problem = str(results.get(name + (f" → {field}" if field else ""), measure)["problem"])
        out[stage].append(problem)
        if problem:
            print(f"{name}: {problem}", file=sys.stderr)
    return out


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def table(walked: list[Walked]) -> Iterator[str]:
    """One line a variant, one column a strategy: on 1, 2 and 3 processes, `ok` or what is wrong."""
    yield "| | " + " | ".join(STRATEGIES) + " | seconds |"
    yield "|---" * (len(STRATEGIES) + 2) + "|"
    for name in dict.fromkeys(w.variant for w in walked):
        cells = []
        for strategy in STRATEGIES:
            these = [w for w in walked if (w.variant, w.strategy) == (name, strategy)]
            bad = [str(w.processes) for w in these if w.problem]
            cells.append(f"**not on {', '.join(bad)}**" if bad else "ok")
        seconds = [w.seconds for w in walked if w.variant == name]
        yield f"| {name} | {' | '.join(cells)} | {min(seconds):.0f} – {max(seconds):.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: make test-matrix")
    parser.add_argument("out", type=Path, metavar="DIR", help="toys, results; another start goes on from there")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants and stages whose name has it")
    parser.add_argument("--part", choices=["journeys", "pairs"], help="one of the two tables")
    args = parser.parse_args()
    root: Path = args.out.resolve()
    room = root / "room"
    for folder in ("toys", "room", "ranks"):
        _fresh(root / folder).mkdir(parents=True)
    for name in ("a", "b"):
        make_source(root / "toys/shards", name, episodes=5 if name == "a" else 3, cameras=("front", "wrist"))
    toys = pairs.Toys(
        root / "toys/shards", make_vae(root / "toys/vae"), make_policy_data(root / "toys/policy", ("front", "wrist")),
        make_base(root / "toys/base"),
    )  # fmt: skip
    results, ranks, bad = Results(root / "results.jsonl"), Ranks(root / "ranks"), 0
    if args.part != "pairs":
        every = variants(toys.shards, toys.vae, toys.policy)
        walked = journeys(ranks, every, results, room, args.only)
        print("\n".join(table(walked)))
        print(f"\n{len(walked)} journeys, {sum(bool(w.problem) for w in walked)} went wrong")
        bad += sum(bool(w.problem) for w in walked)
    if args.part != "journeys":
        found = all_pairs(ranks, toys, results, room, args.only)
        print("\n| stage | options | runs | refused | wrong |\n|---|---|---|---|---|")
        for stage, problems in found.items():
            runs, wrong = len(pairs.rows(stage)), sum(map(bool, problems))
            print(f"| {stage} | {len(pairs.OPTIONS[stage])} | {runs} | {len(problems) - runs} | {wrong} |")
            bad += wrong
    ranks.close()
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
