"""What the benchmarks of success rates share: for each seed a tokenizer, for each arm a policy, its error and rollouts.

Every step is a `stamo` command that is noted under OUT/done when it has ended, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stamo_dist.evaluate.successes import difference, interval
from stamo_dist.recipe.load import load

TASKS = "drawer-open-v3,drawer-close-v3,button-press-topdown-v3,door-open-v3"


@dataclass(frozen=True)
class Arm:
    """One row: a policy, and what of the recipe it changes."""

    name: str
    settings: Sequence[str]


@dataclass
class Found:
    """What the seeds of an arm gave, in their order."""

    successes: list[int] = field(default_factory=list)
    trials: list[int] = field(default_factory=list)
    tasks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # successes and trials
    errors: list[float] = field(default_factory=list)  # mean |error| of normalised held-out actions
    mean_actions: list[float] = field(default_factory=list)  # that of the mean action

    def counts(self) -> tuple[int, int]:
        return sum(self.successes), sum(self.trials)


def parser(doc: str, recipe: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", nargs="?", default=recipe, help="of the policy (%(default)s)")
    made.add_argument("--tokenizer-recipe", default="recipes/tokenizer_demo.yaml", help="(%(default)s)")
    made.add_argument("--benchmark", help="libero or metaworld; that of the training data when omitted")
    made.add_argument("--tasks", default=TASKS, help="separated by commas (%(default)s)")
    made.add_argument("--trials", type=int, default=15, help="of each task, arm and seed (%(default)s)")
    made.add_argument("--seeds", type=int, default=3, help="of tokenizer and policy (%(default)s)")
    made.add_argument("--seed", type=int, help="this one alone, elsewhere or beside the others; the table comes later")
    made.add_argument("--steps", type=int, help="of each policy; the recipe's when omitted")
    made.add_argument("--max-steps", type=int, help="of a trial; the benchmark's when omitted")
    made.add_argument("--frames", type=int, default=400, help="held-out frames of the action error (%(default)s)")
    made.add_argument("--processes", type=int, help="simulators at once")
    made.add_argument("--nproc", type=int, default=1, help="processes that train (%(default)s)")
    made.add_argument("--arms", help="only these, by their numbers from 1, separated by commas")
    made.add_argument(
        "--out", type=Path, default=Path("demo/claims"), help="where it goes on, and finds tokenizers (%(default)s)"
    )
    made.add_argument("--set", action="append", default=[], metavar="A.B=C", help="of the policies' recipe")
    made.add_argument("--tokenizer-set", action="append", default=[], metavar="A.B=C", help="of the tokenizers' recipe")
    return made


class Steps:
    """Runs commands once: what has ended with the same words, after the same others, is not run again."""

    def __init__(self, out: Path, advance: Callable[[str], None]):
        self._out, self._advance = out, advance
        for folder in ("done", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def stamo(self, name: str, made: Path, *words: object, after: str | None = None) -> bool:
        """Whether it was run now. `made` is what it leaves, `after` the step it builds on; see OUT/logs."""
        self._advance(name)
        command, done = [str(word) for word in words], self._out / "done" / f"{name}.json"
        record = {"command": command, "after": after and json.loads((done.parent / f"{after}.json").read_text())}
        if done.is_file() and json.loads(done.read_text()) == record and made.exists():
            return False
        log = self._out / "logs" / f"{name}.log"
        with log.open("w") as file:
            ended = subprocess.run(
                [sys.executable, "-m", "stamo_dist.cli", *command], stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if ended.returncode:
            raise SystemExit(f"stamo {' '.join(command)}\n{log.read_text()[-3000:]}\nthe whole of it: {log}")
        done.write_text(json.dumps(record))
        return True


def run(options: argparse.Namespace, title: str, arms: Sequence[Arm], claims: Sequence[tuple[str, str]]) -> None:
    """Train and roll out every arm, print the table and write it to OUT after each seed.

    `claims`: pairs of arms of which the first is said to be better.
    """
    if options.arms:
        arms = [arms[int(number) - 1] for number in options.arms.split(",")]
    out: Path = options.out
    policy = load(options.recipe, options.set).recipe
    tokenizer = load(options.tokenizer_recipe, options.tokenizer_set).recipe
    found = {arm.name: Found() for arm in arms}
    table = out / f"{title.lower().replace(' ', '_')}-{policy.name}.json"
    cached = tokenizer.data.latents == "cached"
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    ) as bar:  # fmt: skip
        watched = bar.add_task("", total=cached + options.seeds * (2 + 3 * len(arms)))

        def advance(name: str) -> None:
            bar.update(watched, description=name, completed=bar.tasks[0].completed + (begun[0] > 0))
            begun[0] += 1

        begun = [0]
        steps = Steps(out, advance)
        if cached:
            steps.stamo(
                "encode-latents", out / "done", "encode", options.tokenizer_recipe, *_sets(options.tokenizer_set)
            )
        for seed in range(options.seeds) if options.seed is None else [options.seed]:
            eyes = out / f"tokenizer-{seed}"
            own = [*options.tokenizer_set, f"seed={seed}", f"run_dir={eyes}"]
            steps.stamo(
                f"tokenizer-{seed}", eyes / "exported.json", "train", options.tokenizer_recipe, *_sets(own),
                *_nproc(options),
            )  # fmt: skip
            common = [*options.set, f"seed={seed}", f"policy.tokenizer={eyes}"]
            common += [f"train.steps={options.steps}"] if options.steps else []
            states = f"encode-{policy.name}-{seed}"
            steps.stamo(states, out / "done", "encode", options.recipe, *_sets(common), after=f"tokenizer-{seed}")
            for arm in arms:
                name = f"{policy.name}-{''.join(c if c.isalnum() else '_' for c in arm.name)}-{seed}"
                _arm(options, steps, name, [*common, f"run_dir={out / name}", *arm.settings], states, found[arm.name])
            rows = {name: of_arm for name, of_arm in found.items() if of_arm.trials}
            if options.seed is None:
                _write(table, options, policy.name, rows, claims)
        bar.update(watched, completed=bar.tasks[0].total)
    if options.seed is not None:
        return
    table = _table(f"{title}: {policy.name}, {options.seeds} seeds of tokenizer and policy", found)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for line in verdicts(found, claims):
        print(line)
    print(f"wrote {table}")


def _arm(
    options: argparse.Namespace, steps: Steps, name: str, settings: Sequence[str], states: str, found: Found
) -> None:  # fmt: skip
    folder = options.out / name
    trained = steps.stamo(
        f"train-{name}", folder / "exported.json", "train", options.recipe, *_sets(settings), *_nproc(options),
        after=states,
    )  # fmt: skip
    if trained:  # the results of other weights are none of its
        for result in ("actions", "rollout"):
            shutil.rmtree(folder / "eval" / result, ignore_errors=True)
    error = folder / "eval/actions/actions.json"
    steps.stamo(f"actions-{name}", error, "eval", "actions", folder, "--frames", options.frames, after=f"train-{name}")
    rolled = folder / "eval/rollout/rollout.json"
    more = [
        word
        for key in ("benchmark", "max_steps", "processes")
        if (value := getattr(options, key)) is not None
        for word in (f"--{key.replace('_', '-')}", value)
    ]
    steps.stamo(
        f"rollout-{name}", rolled, "eval", "rollout", folder, "--tasks", options.tasks, "--trials", options.trials,
        "--videos", 0, *more, after=f"train-{name}",
    )  # fmt: skip
    _read(found, json.loads(error.read_text())["rows"], json.loads(rolled.read_text())["rows"])


def _read(found: Found, errors: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    found.errors.append(statistics.mean(row["mae"] for row in errors))
    found.mean_actions.append(statistics.mean(row["baseline"] for row in errors))
    counts = {row["task"]: (round(row["trials"] * row["success"] / 100), row["trials"]) for row in rows}
    counts.pop("all tasks", None)  # a row for each suite
    found.successes.append(sum(good for good, _ in counts.values()))
    found.trials.append(sum(trials for _, trials in counts.values()))
    for task, pair in counts.items():
        found.tasks.setdefault(task, []).append(pair)


def verdicts(found: Mapping[str, Found], claims: Sequence[tuple[str, str]]) -> list[str]:
    """Whether the first of each pair is ahead, by the interval of the difference of the pooled trials."""
    lines = []
    for ours, other in claims:
        if not all(name in found and found[name].trials for name in (ours, other)):
            continue
        by, low, high = difference(_row(found[ours]), _row(found[other]))
        word = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
        lines.append(f"{ours}: {word} {other} ({by:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})")
    return lines


def _row(found: Found) -> dict[str, Any]:
    good, trials = found.counts()
    low, high = interval(good, trials)
    return {
        "trials": trials, "success": 100 * good / trials, "low": low, "high": high,
        "seeds": [100 * g / n for g, n in zip(found.successes, found.trials, strict=True)],
        "error": statistics.mean(found.errors), "error_seeds": found.errors,
        "error_mean_action": statistics.mean(found.mean_actions),
        "tasks": {task: 100 * sum(g for g, _ in ran) / sum(n for _, n in ran) for task, ran in found.tasks.items()},
    }  # fmt: skip


def _table(title: str, found: Mapping[str, Found]) -> Table:
    table = Table(
        title=title,
        caption="success: trials of all seeds together, with Wilson's 95 % interval, which does not know that seeds "
        "differ; error: of normalised held-out actions, where the mean action's is "
        + ", ".join(sorted({f"{statistics.mean(of_arm.mean_actions):.3f}" for of_arm in found.values()})),
    )
    tasks = list(dict.fromkeys(task for of_arm in found.values() for task in of_arm.tasks))
    for column in ("", "trials", "success %", "95 %", "seeds", "error", "seeds", *tasks):
        table.add_column(column, justify="right" if column else "left")
    for name, of_arm in found.items():
        row = _row(of_arm)
        table.add_row(
            name, str(row["trials"]), f"{row['success']:.1f}", f"{row['low']:.1f} – {row['high']:.1f}",
            " ".join(f"{rate:.0f}" for rate in row["seeds"]), f"{row['error']:.4f}",
            " ".join(f"{error:.4f}" for error in row["error_seeds"]),
            *(f"{row['tasks'][task]:.0f}" if task in row["tasks"] else "–" for task in tasks),
        )  # fmt: skip
    return table


def _write(
    path: Path, options: argparse.Namespace, name: str, found: Mapping[str, Found], claims: Sequence[tuple[str, str]]
) -> None:
    about = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {
        "policy": name, "options": about, "command": sys.argv,
        "rows": [{"arm": arm, **_row(of_arm), "counts": asdict(of_arm)} for arm, of_arm in found.items()],
        "verdicts": verdicts(found, claims),
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _sets(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _nproc(options: argparse.Namespace) -> list[object]:
    return ["--nproc", options.nproc] if options.nproc > 1 else []
