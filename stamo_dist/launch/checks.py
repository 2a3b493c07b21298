"""Checks before a job is queued: whether recipe, folder and cluster fit together."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stamo_dist.errors import RecipeError, RunError
from stamo_dist.launch import conflicts, container, slurm
from stamo_dist.launch.grace import preemption_grace
from stamo_dist.launch.profile import ClusterProfile, ProfileError, seconds
from stamo_dist.launch.record import Launch
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.layers import did_you_mean
from stamo_dist.recipe.load import Loaded
from stamo_dist.run.lease import last_start

_HINTS = (
    (
        "Invalid account or account/partition",
        "{account} may not use {partition}, has expired or does not exist; "
        "`sacctmgr show assoc user=$USER` lists yours",
    ),
    (
        "violates accounting/QOS policy",
        "{account} or {qos} allows less, or no more: "
        "`sacctmgr show assoc where user=$USER format=account,partition,qos,grptresmins,maxjobs,maxsubmitjobs,maxwall`",
    ),
    ("Invalid qos", "{qos}: `sacctmgr show qos` lists what there is"),
    ("Requested node configuration is not available", "no node has that many GPUs, CPUs or that much memory"),
    ("Node count specification invalid", "the partition allows another number of nodes"),
    ("Invalid feature specification", "the profile's constraint {constraint} names no feature of a node"),
    ("Requested time limit is invalid", "the profile's time {time} is more than the partition allows"),
    ("Invalid generic resource", "the cluster knows no GPU {gpu_type}, or calls it otherwise; `sinfo -o %G` shows it"),
    (
        "Invalid job array specification",
        "the array has more tasks than the cluster's MaxArraySize allows ({max_array}); give fewer values or slices",
    ),
    ("unrecognized option", "this cluster's Slurm has no such option; `sbatch --help` lists those it has"),
    (
        "Could not establish a configuration source",
        "Slurm does not answer on this machine: submit from a login node of the cluster, or with --cluster local",
    ),
    ("Unable to contact slurm controller", "the Slurm controller does not answer; ask again later"),
)


def node_counts(loaded: Loaded, profile: ClusterProfile) -> tuple[list[int], list[str]]:
    """(numbers of nodes in the profile's range on which the recipe can run; notes on the others).

    Raises:
        RecipeError: It can run on none of them.
    """
    least, most = profile.node_range(profile.nodes)
    fits, problems = [], []
    for nodes in range(least, most + 1):
        try:
            batching(loaded.recipe.train, nodes * profile.processes)
            fits.append(nodes)
        except ValueError as e:
            problems.append(str(e))
    if not fits or (least == most and problems):
        raise RecipeError(problems[-1:])
    unused = sorted(set(range(least, most + 1)) - set(fits))
    batch, per_node = loaded.recipe.train.batches, profile.processes
    notes = [
        f"with {nodes} nodes it uses {max((n for n in fits if n < nodes), default=0)} of them: {nodes * per_node} "
        f"processes do not divide train.global_batch {batch}"
        for nodes in unused
        if nodes > fits[0]
    ]
    return fits, notes


def unasked(profiles: Iterable[ClusterProfile]) -> list[str]:
    """Notes that Slurm had no say in a dry run, where it had none."""
    backends = {profile.backend for profile in profiles}
    notes = ["Slurm is not asked: it would run on this machine"] if "local" in backends else []
    if "slurm" in backends and not slurm.available():
        notes.append("Slurm was not asked, there is none here: what its partitions, accounts and limits allow is open")
    return notes


def vacant(run: Path) -> None:
    """Check that nobody trains in the run folder by hand.

    Raises:
        RunError: A process of this machine does.
    """
    owner = last_start(run).owner
    if owner is not None and not owner.ended and owner.local and owner.alive:
        raise RunError(
            f"run_dir: {run}: {owner} is training here; stop it (Ctrl-C), then submit, or name another run_dir"
        )


def cluster(profile: ClusterProfile, least: int) -> float:
    """Check that the partition exists and is large enough, using queries open to every user.

    Returns the seconds between a job's stop request and its kill there.

    Raises:
        ProfileError: All that does not fit.
    """
    found = slurm.partitions()
    name = partition_of(profile) or next((n for n, p in found.items() if p.get("Default") == "YES"), None)
    if name is None:
        raise ProfileError([f"partition: the cluster has no default; there are {', '.join(found)}"])
    if name not in found:
        hint = did_you_mean(name, found) or f"there are {', '.join(found)}"
        raise ProfileError([f"partition: the cluster has none called {name}; {hint}"])
    partition, problems = found[name], []
    if partition.get("State") not in (None, "UP"):
        problems.append(f"partition: {name} is {partition['State']}")
    limits = [int(partition[k]) for k in ("TotalNodes", "MaxNodes") if partition.get(k, "").isdecimal()]
    if limits and least > min(limits):
        problems.append(f"nodes: at least {least} are asked for, and partition {name} gives at most {min(limits)}")
    longest = partition.get("MaxTime", "UNLIMITED")
    if longest != "UNLIMITED" and seconds(profile.time) > seconds(longest):
        problems.append(f"time: {profile.time} is more than partition {name} allows, {longest}")
    problems += _account(profile, name, partition)
    if problems:
        raise ProfileError(problems)
    preempted = preemption_grace(slurm.config(), partition)
    return min(preempted if preempted is not None else float("inf"), float(profile.signal_delay))


def partition_of(profile: ClusterProfile) -> str | None:
    """The partition that sbatch is asked for, or its variable says; None: the cluster's default."""
    return profile.partition or os.environ.get("SBATCH_PARTITION") or None


def shell_and_container(launch: Launch, script: str) -> list[str]:
    """Check that sbatch's variables do not contradict the script, and that the container can be made; returns notes.

    Raises:
        ProfileError: They do.
        RunError: It cannot.
    """
    if found := list(conflicts.of_shell(script, os.environ)):
        raise ProfileError(found)
    inside = launch.profile.get("container")
    if not inside:
        return []
    container.own_folders(launch)
    return list(container.note(inside))


def _account(profile: ClusterProfile, name: str, partition: Mapping[str, str]) -> Iterator[str]:
    """Check that the account and QOS may be used there, as far as every user may query."""
    for field, value, allows, denies in (
        ("account", profile.account, "AllowAccounts", "DenyAccounts"),
        ("qos", profile.qos, "AllowQos", "DenyQos"),
    ):
        allowed, denied = _listed(partition.get(allows)), _listed(partition.get(denies)) or []
        default = None
        if value is None and field == "account" and (allowed is not None or denied):
            default = slurm.default_account(getpass.getuser())
        charged = value or default
        if charged is not None and ((allowed is not None and charged not in allowed) or charged in denied):
            these = f"only {', '.join(allowed)}" if allowed is not None else f"any but {', '.join(denied)}"
            which = f"{charged}, your default account" if value is None else charged
            name_one = "; name one of yours in the profile" if value is None else ""
            yield f"{field}: partition {name} does not take {which}; it takes {these}{name_one}"
    mine = slurm.associations(getpass.getuser())
    if mine is None:
        return
    here = [a for a in mine if a.partition in ("", name)]
    accounts = sorted({a.account for a in here})
    if not here:
        others = ", ".join(sorted(f"{a.account} in {a.partition}" for a in mine)) or "none at all"
        yield f"account: you have none for partition {name}, or it has expired; you have {others}"
    elif profile.account is not None and profile.account not in accounts:
        hint = did_you_mean(profile.account, accounts) or f"yours are {', '.join(accounts)}"
        yield f"account: {profile.account} is none of yours for partition {name}, or has expired; {hint}"
    elif profile.qos is not None:
        qos = sorted(set[str]().union(*(a.qos for a in here if profile.account in (None, a.account))) - {""})
        if profile.qos not in qos:
            hint = did_you_mean(profile.qos, qos) or f"there are {', '.join(qos) or 'none'}"
            yield f"qos: you may not use {profile.qos} with account {profile.account or 'yours'}; {hint}"


def _listed(names: str | None) -> list[str] | None:
    """Names that a partition allows or denies; None if it does not restrict them."""
    return None if names in (None, "", "ALL", "(null)") else names.split(",")


def hinted(words: str, profile: ClusterProfile) -> str:
    """Slurm's message, with an explanation."""
    for pattern, hint in _HINTS:
        if pattern in words:
            return f"{words}\n  {hint.format_map(_named(profile, hint))}"
    return words


def _named(profile: ClusterProfile, hint: str) -> dict[str, Any]:
    """The profile's fields in words; those that it leaves to the cluster are the defaults."""
    names: dict[str, Any] = profile.model_dump()
    for field in ("account", "qos", "partition"):
        names[field] = f"the {field} {names[field]}" if names[field] is not None else f"your default {field}"
    if "{max_array}" in hint:
        with contextlib.suppress(slurm.SlurmError):
            names["max_array"] = slurm.config().get("MaxArraySize", "")
    return {"max_array": "see `scontrol show config`", **names}
