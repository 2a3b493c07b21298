"""All checks of the doctor, in order: this machine, the recipe, Slurm's settings, the nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from stamo_dist.errors import StamoError
from stamo_dist.launch import checks, slurm
from stamo_dist.launch.doctor import machine, nodes
from stamo_dist.launch.doctor.settings import judge_settings, read_settings
from stamo_dist.launch.doctor.verdict import Finding
from stamo_dist.launch.grace import leaving_takes
from stamo_dist.launch.profile import ClusterProfile, load_profile
from stamo_dist.launch.recipe_checks import read
from stamo_dist.recipe.load import Loaded
from stamo_dist.run.folder import RunFolder
from stamo_dist.words import counted

_SLURM = "Slurm"


def diagnose(
    recipe: Path | None,
    overrides: Sequence[str],
    cluster: str,
    count: int | None,
    *,
    job: bool,
    patience: float,
    say: Callable[[str], None],
) -> Iterator[Finding]:
    """Run all checks.

    Args:
        recipe, overrides: The recipe to train; None checks the environment alone.
        cluster: A profile.
        count: Nodes of the job; overrides the profile's.
        job: Also start processes, on the nodes or here.
        patience: Seconds that the job may be queued.
        say: Called with the current activity.

    Raises:
        StamoError: The recipe or the profile cannot be read.
    """
    name, profile = load_profile(cluster, [f"nodes={count}", "min_nodes=null", "max_nodes=null"] if count else [])
    loaded = read(recipe, overrides) if recipe else None
    say("looking at this machine")
    yield from machine.judge_versions()
    run = Path(loaded.recipe.run_dir if loaded else "runs").absolute()
    paths, wandb = [str(run)], ""
    if loaded is not None:
        yield from machine.judge_recipe(loaded, profile.environment)
        yield from machine.judge_wandb(loaded.recipe)
        wandb = machine.wandb_host(loaded.recipe)
        if any("://" in path for source in loaded.recipe.data.used.values() for path in source.paths):
            paths.append(loaded.recipe.data.cache)
    usable = True
    if profile.backend == "slurm":
        say("asking Slurm")
        found = list(_slurm(profile, loaded))
        usable = not any(f.level == "error" and f.area == _SLURM for f in found)
        yield from found
    if not job or not usable:
        return
    try:
        RunFolder(run).check()
    except StamoError as e:
        if loaded is None:  # of a recipe it is said already
            yield Finding("error", "Nodes", str(e), "look from another folder, or with a recipe")
        return
    folder, made = _scratch(run)
    try:
        if profile.backend == "slurm":
            yield from nodes.on_cluster(folder, name, profile, paths, wandb, patience=patience, say=say)
        else:
            processes = _gpus() or max(2, profile.processes)
            say(f"starting {counted(processes, 'process')} here")
            yield from nodes.here(folder, processes, paths, wandb)
    except StamoError as e:
        yield Finding("error", "Nodes", str(e), "mend what Slurm or the folder says, and look again")
    finally:
        if made is not None and not folder.exists():
            _remove_empty(folder.parent, made)


def _slurm(profile: ClusterProfile, loaded: Loaded | None) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding(
            "error", _SLURM, "there is no sbatch here", "log in to the cluster's login node, or --cluster local"
        )
        return
    try:
        text = slurm.run("scontrol", "show", "config")
        partitions = slurm.partitions()
    except StamoError as e:
        yield Finding("error", _SLURM, str(e), "see whether `sinfo` answers; SLURM_CONF names the configuration")
        return
    config = read_settings(text)
    yield Finding("fine", _SLURM, f"{config.get('ClusterName', 'the cluster')} runs {_version()}")
    try:
        checks.cluster(profile, profile.node_range(profile.nodes)[0])
    except StamoError as e:
        for problem in getattr(e, "problems", [str(e)]):
            yield Finding("error", _SLURM, problem, "change the profile, or --nodes")
        return
    default = next((p for p in partitions.values() if p.get("Default") == "YES"), {})
    partition = partitions.get(profile.partition or "", default)
    leaving = leaving_takes(Path(loaded.recipe.run_dir)) if loaded is not None else None
    yield from judge_settings(config, partition, leaving=leaving, now=datetime.now())
    if leaving is not None and leaving > profile.signal_delay:
        what = f"leaving takes {leaving:.0f} s, and the time limit gives {profile.signal_delay} s notice"
        fix = f"signal_delay: {int(2 * leaving) + 30} in the profile"
        yield Finding("error", _SLURM, what, fix)


def _version() -> str:
    try:
        return slurm.run("sbatch", "--version").strip()
    except StamoError:
        return "an unknown version"


def _gpus() -> int:
    """GPUs of this machine, without torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())


def _scratch(run: Path) -> tuple[Path, Path | None]:
    """A new folder beside the runs, and the topmost folder created with it."""
    folder = run.parent / f".doctor-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    made = next((p for p in reversed(folder.parents) if not p.exists()), None)
    return folder, made


def _remove_empty(folder: Path, last: Path) -> None:
    try:
        while folder != last.parent:
            folder.rmdir()
            folder = folder.parent
    except OSError:
        pass
