"""Checks before a job is queued: whether recipe, data, weights, folder and cluster fit together."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stamo_dist.data import at_hand
from stamo_dist.data.schema import read_manifest
from stamo_dist.errors import DataError, RecipeError, RunError
from stamo_dist.launch import conflicts, container, slurm
from stamo_dist.launch.further import FURTHER
from stamo_dist.launch.grace import preemption_grace
from stamo_dist.launch.profile import ClusterProfile, ProfileError, seconds
from stamo_dist.launch.record import Launch
from stamo_dist.pretrained.place import hub_id
from stamo_dist.pretrained.wanted import look_at
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.layers import did_you_mean
from stamo_dist.recipe.load import Loaded
from stamo_dist.recipe.unread import unread
from stamo_dist.run.lease import last_start

EXPORTED = "stamo.json"  # file that identifies an exported tokenizer
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


@dataclass(frozen=True)
class Looked:
    """Result of the checks of a recipe.

    Attributes:
        problems: What training refuses.
        notes: What may be unintended.
        to_download: (field, problem, remedy) of weights that the run would have to download.
        advice: How its data are used.
    """

    problems: list[str]
    notes: list[str]
    to_download: list[tuple[str, str, str]]
    advice: list[str]


def look(
    loaded: Loaded,
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    world_size: int | None = None,
    offline: bool = False,
    advise: bool = True,
) -> Looked:
    """Check a recipe without starting it, for `stamo train`, `submit`, `doctor` and `recipe check`.

    Args:
        loaded: The recipe.
        environment: Variables that the run will have besides this process's.
        world_size: Also check that the global batch and hsdp's groups divide over this many processes.
        offline: Skip data and weights, which are not on this machine.
        advise: Also look at how the data are used, which takes numpy.
    """
    problems = list[str]()
    if world_size is not None:
        try:
            batching(loaded.recipe.train, world_size)
            loaded.recipe.strategy.check_processes(world_size)
        except ValueError as e:
            problems.append(_located(loaded, str(e)))
    if offline:
        return Looked(problems, list(_notes(loaded)), [], [])
    # A run that goes on reads the weights of the commit that it began with, which its checkpoints name.
    looked = Weights([], []) if _has_checkpoints(loaded) else weights(loaded, environment)
    data = [_placed(loaded, misfit.field, misfit.text) for misfit in at_hand.look(loaded.recipe.data)]
    advice = list[str]()
    if not data and advise:
        try:
            advice = [line for further in FURTHER for line in further(loaded.recipe)]
        except RecipeError as e:
            data += [_located(loaded, problem) for problem in e.problems]
    if not data:
        data += [_placed(loaded, misfit.field, misfit.text) for misfit in at_hand.too_far(loaded.recipe.data)]
    problems += [*data, *_initial(loaded), *looked.problems, *_policy(loaded)]
    return Looked(problems, [*_notes(loaded), *_to_encode(loaded)], looked.to_download, advice)


def recipe(
    loaded: Loaded, environment: Mapping[str, str] = MappingProxyType({}), world_size: int | None = None
) -> Looked:
    """As `look`, but problems are raised.

    Raises:
        RecipeError: All missing or wrong items.
    """
    advise = loaded.recipe.stage == "policy"  # of other stages nothing more is refused
    looked = look(loaded, environment, world_size=world_size, advise=advise)
    if looked.problems:
        raise RecipeError(looked.problems)
    return looked


def unasked(profiles: Iterable[ClusterProfile]) -> list[str]:
    """Notes that Slurm had no say in a dry run, where it had none."""
    backends = {profile.backend for profile in profiles}
    notes = ["Slurm is not asked: it would run on this machine"] if "local" in backends else []
    if "slurm" in backends and not slurm.available():
        notes.append("Slurm was not asked, there is none here: what its partitions, accounts and limits allow is open")
    return notes


def folder(run: Path) -> None:
    """Check that the run folder can be written, without creating it.

    Raises:
        RunError: It cannot be written.
    """
    there = next(p for p in [run, *run.parents] if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise RunError(f"run_dir: {run}: {there} {why}; choose another with --set run_dir=…")


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
    name = profile.partition or next((n for n, p in found.items() if p.get("Default") == "YES"), None)
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


def _notes(loaded: Loaded) -> Iterator[str]:
    yield from unread(loaded)
    warmup, steps = loaded.recipe.optimizer.warmup_steps, loaded.recipe.train.steps
    if warmup >= steps:
        text = f"optimizer.warmup_steps: {warmup} steps of warm-up in a run of {steps}: it never reaches optimizer.lr"
        yield _placed(loaded, "optimizer.warmup_steps", text)
    elif (o := loaded.recipe.optimizer).schedule == "wsd" and (decay := o.decay_of(steps)) > (left := steps - warmup):
        text = f"optimizer.decay_steps: {decay} are more than the {left} steps after the warm-up: it is shorter"
        yield _placed(loaded, "optimizer.decay_steps", text)


def _has_checkpoints(loaded: Loaded) -> bool:
    return any((Path(loaded.recipe.run_dir) / "checkpoints").glob("step_*"))


def _initial(loaded: Loaded) -> Iterator[str]:
    """Check that the weights are there that the run begins with, unless it goes on from a checkpoint of its own."""
    initial = loaded.recipe.init_from
    if initial is None or (hub_id(initial.path) and not Path(initial.path).parent.is_dir()) or _has_checkpoints(loaded):
        return
    if not Path(initial.path).expanduser().is_dir():
        field = _placed(loaded, "init_from.path")
        yield f"{field}: there is no folder {initial.path}; give a run, a checkpoint or an exported model"


def _to_encode(loaded: Loaded) -> Iterator[str]:
    """What `stamo encode` has to write before the training."""
    recipe = loaded.recipe
    caches = [("latents", "data.latents", recipe.data.latents)]
    if recipe.stage == "policy":
        caches.append(("states", "policy.targets", recipe.policy.targets))
    for kind, field, value in caches:
        missing = at_hand.not_encoded(recipe.data, kind) if value == "cached" else []
        if missing:
            text = f"{field}: cached, and there are no {kind} beside {', '.join(missing)}; `stamo encode` first"
            yield _placed(loaded, field, text)


@dataclass(frozen=True)
class Weights:
    """Problems of a recipe's weights, and (field, problem, remedy) of those to be downloaded."""

    problems: list[str]
    to_download: list[tuple[str, str, str]]


def weights(loaded: Loaded, environment: Mapping[str, str] = MappingProxyType({})) -> Weights:
    """Check the headers of all weights that the stage reads; offline, weights missing on this machine are problems."""
    environ = {**os.environ, **environment}
    looked = look_at(loaded.recipe, environ)
    problems = [p.replace(field, _placed(loaded, field), 1) for field, found in looked.problems.items() for p in found]
    absent = [
        (
            _placed(loaded, field),
            f"{repo} is not in the hub's cache",
            f"`{command}` here, into a cache that the nodes see",
        )
        for field, (repo, command) in looked.absent.items()
    ]
    if environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):  # as the hub's client reads it
        return Weights(problems, absent)
    return Weights([*problems, *(f"{f}: {what}, and HF_HUB_OFFLINE is set; {fix}" for f, what, fix in absent)], [])


def _policy(loaded: Loaded) -> Iterator[str]:
    """Check a policy's further needs: its tokenizer, and the statistics of actions."""
    recipe, policy = loaded.recipe, loaded.recipe.policy
    if recipe.stage != "policy":
        return
    folder = policy.tokenizer
    if folder is not None and (policy.world is not None or policy.vision == "stamo"):
        root = Path(folder).expanduser()
        if not any((place / EXPORTED).is_file() for place in (root, root / "model")):
            field = _placed(loaded, "policy.tokenizer")
            yield f"{field}: {folder} holds no tokenizer that was trained to its end; `stamo submit` its recipe first"
    for name, source in recipe.data.used.items():
        for path in source.paths if source.actions else ():
            with contextlib.suppress(DataError):
                manifest = read_manifest(Path(path).expanduser())
                if manifest.action_dim and "action" not in manifest.stats:
                    field = _placed(loaded, f"data.sources.{name}.path")
                    yield f"{field}: {path} has no statistics of its actions; `stamo data stats {path}` makes them"


def _placed(loaded: Loaded, field: str, text: str | None = None) -> str:
    """The text, by default the field, after the file and line that set the field."""
    place = loaded.provenance.get(field, "default")
    text = field if text is None else text
    return text if place in ("default", "--set") else f"{place}: {text}"


def _located(loaded: Loaded, text: str) -> str:
    """A text that begins with a field, after the place of that field."""
    return _placed(loaded, text.partition(":")[0], text)
