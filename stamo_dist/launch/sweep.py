"""Sweeps: one recipe, several values of some fields, one run each.

`--sweep optimizer.lr=1e-4,3e-4 --sweep seed=0,1` is the grid of all combinations. The members are ordinary runs below
the recipe's run folder, `RUN_DIR/sweep/lr=0.0001,seed=0`; that they were submitted as one array is all they share.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stamo_dist.errors import RecipeError
from stamo_dist.launch.known import SWEEP
from stamo_dist.launch.submit import Order, plan
from stamo_dist.recipe.lines import read_override, show_value
from stamo_dist.recipe.load import load

_PLAIN = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Point:
    """One member of a sweep."""

    values: dict[str, str]  # field → value, as YAML

    @property
    def overrides(self) -> list[str]:
        return [f"{field}={value}" for field, value in self.values.items()]

    @property
    def name(self) -> str:
        """A folder name that says the values; fields by their last part where that tells them apart."""
        lasts = [field.rpartition(".")[2] for field in self.values]
        short = {f: last if lasts.count(last) == 1 else f for f, last in zip(self.values, lasts, strict=True)}
        return ",".join(f"{short[field]}={_PLAIN.sub('-', value)}" for field, value in self.values.items())


def expand(sweeps: Sequence[str]) -> list[Point]:
    """All combinations of the values of the `FIELD=VALUE,VALUE…` given, the last field changing fastest.

    Raises:
        RecipeError: One cannot be read, or names a field twice, or gives a value twice.
    """
    axes: dict[str, list[str]] = {}
    problems = []
    for sweep in sweeps:
        field, equals, text = (part.strip() for part in sweep.partition("="))
        values = _values(field, text) if equals and text else None
        if values is None:
            problems.append(f"--sweep {sweep}: write FIELD=VALUE,VALUE, for example --sweep optimizer.lr=1e-4,3e-4")
        elif field in axes:
            problems.append(f"--sweep {field}: given twice; put all its values into one")
        elif len(set(values)) < len(values):
            problems.append(f"--sweep {field}: a value is given twice")
        else:
            axes[field] = values
    points = [Point(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    if not problems and len({p.name for p in points}) < len(points):
        problems.append("--sweep: two of the runs would have the same folder name")
    if problems:
        raise RecipeError(problems)
    return points


def orders(
    recipe: str | Path, cluster: str, sweeps: Sequence[str], overrides: Sequence[str] = (), **asked: Any
) -> tuple[list[Order], str]:
    """(one array of all runs of the sweep, or a list of them for this machine; the folder around them).

    `asked`: what the command line asks of the cluster, as `submit.plan` takes it.

    Raises:
        StamoError: The sweep, one of its recipes or the profile is wrong.
    """
    points = expand(sweeps)
    base = load(recipe, overrides).recipe
    folder = Path(base.run_dir) / SWEEP
    found = []
    for point in points:
        own = {"run_dir": str(folder / point.name), "name": f"{base.name}-{point.name}"}
        set_ = [f"{field}={show_value(value, limit=1 << 16)}" for field, value in own.items()]
        found.append(plan(recipe, cluster, overrides=[*overrides, *point.overrides, *set_], **asked))
    if found[0].profile.backend == "local":
        return found, str(folder)
    if any(order.launch.node_counts != found[0].launch.node_counts for order in found):
        raise RecipeError(["--sweep: the runs of an array have the same nodes, and these recipes need different ones"])
    return [replace(found[0], members=found)], str(folder)


def _values(field: str, text: str) -> list[str] | None:
    """The values, each as YAML; None where they cannot be read. Lists keep their brackets: `a=[1,2],[3,4]`."""
    layer = read_override(f"{field}=[{text}]")
    value: object = layer.value
    if layer.problems:
        return None
    for name in field.split("."):
        value = value[name] if isinstance(value, dict) else None
    return [show_value(v, limit=1 << 16) for v in value] if isinstance(value, list) and value else None
