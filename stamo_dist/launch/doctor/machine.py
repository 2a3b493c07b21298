"""Checks on this machine alone: installed versions, the recipe's requirements, W&B."""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stamo_dist.launch.doctor.disk import read_speed
from stamo_dist.launch.doctor.probe import reach
from stamo_dist.launch.doctor.verdict import Finding
from stamo_dist.launch.recipe_checks import Scope, look
from stamo_dist.recipe.load import Draft, Loaded
from stamo_dist.recipe.schema import Recipe

_PACKAGE = "stamo-dist"
_HERE, _RECIPE = "This machine", "The recipe"
_SLOW_READ = 50e6  # bytes per second


def judge_versions() -> Iterator[Finding]:
    """Whether Python and every package have a required version."""
    try:
        pythons = metadata.metadata(_PACKAGE)["Requires-Python"] or ""
        needed = [Requirement(r) for r in metadata.requires(_PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield Finding("note", _HERE, f"{_PACKAGE} is not installed, only importable", "`pip install -e .` here")
        return
    python = sys.version.split()[0]
    looked = wrong = 0
    if not SpecifierSet(pythons).contains(python, prereleases=True):
        wrong += 1
        yield Finding("error", _HERE, f"python {python} is not {pythons}", "make an environment with another one")
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        looked += 1
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            what = f"{requirement.name}: {found or 'missing'}, needed is {requirement.specifier or 'any'}"
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding("error", _HERE, what, fix)
    if not wrong:
        yield Finding("fine", _HERE, f"python {python} and the {looked} packages are as required")


def judge_recipe(loaded: Loaded, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether data and weights are there and right, for a run in this environment, and how fast the data is read."""
    looked = look(Draft(loaded), Scope(environment))
    for problem in looked.problems:
        yield Finding("error", _RECIPE, problem, "do as it says, put it there, or change the field")
    for note in looked.notes:
        yield Finding("warning", _RECIPE, note, "change one of them, if it is not meant so")
    for field, what, fix in looked.to_download:
        said = f"{field}: {what}; nodes without network cannot get it"
        yield Finding("warning", _RECIPE, said, f"{fix} (HF_HOME); then set HF_HUB_OFFLINE=1")
    if not looked.problems:
        what = "the data and the weights that are here" if looked.to_download else "data and weights are there and"
        yield Finding("fine", _RECIPE, f"{what} fit the recipe")
    for name, source in loaded.recipe.data.used.items():
        shard = next(
            (s for path in source.paths if "://" not in path for s in Path(path).expanduser().rglob("*.mds")), None
        )
        if shard is None:
            continue
        try:
            speed = read_speed(shard)
        except OSError as e:
            yield Finding(
                "error", _RECIPE, f"data.sources.{name}: {shard}: {e.strerror}", "have it made readable for you"
            )
            continue
        about = f"data.sources.{name}: a shard is read at {speed / 1e6:.0f} MB/s"
        if speed < _SLOW_READ and shard.stat().st_size > 1 << 20:
            fix = "`stamo data sync` copies the source to a faster disk"
            yield Finding("warning", _RECIPE, about, fix)
        else:
            yield Finding("fine", _RECIPE, about)


def judge_wandb(recipe: Recipe) -> Iterator[Finding]:
    """Whether the recipe's tracking can work."""
    mode = recipe.tracking.wandb
    if mode == "off":
        return
    if importlib.util.find_spec("wandb") is None:
        yield Finding("error", _RECIPE, f"tracking.wandb: {mode}, but wandb is not installed", "pip install wandb")
    elif mode == "offline":
        yield Finding("fine", _RECIPE, "tracking.wandb: offline; `wandb sync` uploads it later")
    else:
        host = wandb_host(recipe)
        if not _has_key(host):
            what = f"tracking.wandb: online, and there is no key for {host}"
            fix = "`wandb login` once, on a machine that shares this home; or tracking.wandb: offline"
            yield Finding("error", _RECIPE, what, fix)
        if why := reach(host):
            yield unreachable("this machine", host, why)
        else:
            yield Finding("fine", _RECIPE, f"{host} can be reached from here")


def wandb_host(recipe: Recipe) -> str:
    """The host that the run must reach, "" for none."""
    if recipe.tracking.wandb != "online":
        return ""
    return urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""


def unreachable(who: str, host: str, why: str) -> Finding:
    fix = (
        "--set tracking.wandb=offline, and `wandb sync RUN/wandb/offline-*` from a machine with network; or a proxy "
        "(HTTPS_PROXY in the profile's environment)"
    )
    return Finding("error", _RECIPE, f"{who} cannot reach {host}: {why}", fix)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
