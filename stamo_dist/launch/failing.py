"""Nodes on which starts of a run failed or hung, and that its next start is kept off."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from stamo_dist.faults.heartbeats import hung_ranks
from stamo_dist.launch import slurm
from stamo_dist.launch.logs import failures_of
from stamo_dist.launch.record import FAILING_NODE_HOURS, Event, Launch, newest_first
from stamo_dist.words import counted

_OFTEN = 2  # failures after which a node is left out
_MANY = 3  # nodes with the same failure: it is the program's
_LONGEST = 200  # characters of a cause
HUNG = "it hung"
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True)
class Blame:
    """The nodes on which a start failed or hung, as far as they are known, and the error there."""

    nodes: list[str] = field(default_factory=list)
    cause: str = ""


@dataclass(frozen=True)
class LostTask:
    """The first task that srun said had failed."""

    node: str
    task: int
    words: str  # Exited with exit code 1, Killed, …


def find_blame(
    run: Path, nodes: Sequence[str], per_node: int, heads: Collection[str], lost: LostTask | None, *, left: bool
) -> Blame:
    """Who is to blame for the end of a start.

    Args:
        run: The run folder.
        nodes, per_node: The start's nodes, and ranks of each.
        heads: How the logs' lines begin that name the start.
        lost: What srun said first.
        left: The ranks left by themselves: asked to, or because they hung.
    """
    hung = hung_ranks(run / "logs")
    if hung is not None:
        return Blame(_nodes_of(hung, nodes, per_node), HUNG)
    if left:
        return Blame()
    failures = failures_of(run, heads)
    own = sorted((f for f in failures if not f.follows), key=lambda f: (f.time, f.rank))
    if own:
        return Blame(_nodes_of([f.rank for f in own], nodes, per_node), own[0].error[:_LONGEST])
    if lost is None or any(f.rank == lost.task for f in failures):  # it only lost the others
        return Blame()
    return Blame([lost.node], lost.words[:_LONGEST])


def _nodes_of(ranks: Iterable[int], nodes: Sequence[str], per_node: int) -> list[str]:
    return sorted({nodes[rank // per_node] for rank in ranks if rank // per_node < len(nodes)})


def failing(history: Iterable[Event], hours: float, now: datetime | None = None) -> dict[str, int]:
    """Node → number of starts that failed or hung there within the last so many hours, of those with several.

    A failure that happened on every node that was tried, or the same one on several, is the program's: no node counts.

    Args:
        history: The run's events, oldest first, of earlier submissions too.
        hours: After these a failure is forgotten; 0: no node is left out.
        now: The current time.
    """
    since = (now or datetime.now(timezone.utc)) - timedelta(hours=hours)
    recent = [e for e in history if hours and datetime.fromisoformat(e.time) > since]
    tried = {node for e in recent if e.event == "started" for node in e.nodes}
    by_cause: dict[str, Counter[str]] = defaultdict(Counter)
    for e in recent:
        by_cause[_kind(e.cause, tried)].update(e.blamed)
    counts: Counter[str] = Counter()
    for of_cause in by_cause.values():
        if len(of_cause) < _MANY and not (len(of_cause) > 1 and tried <= of_cause.keys()):
            counts.update(of_cause)
    return {node: count for node, count in sorted(counts.items()) if count >= _OFTEN}


def _kind(cause: str, nodes: Iterable[str]) -> str:
    """A cause without what differs from node to node."""
    for node in nodes:
        cause = cause.replace(node, "")
    return _NUMBERS.sub("", cause)


def failing_now(launch: Launch, *more: Event) -> dict[str, int]:
    """`failing` of a run's record and events that it does not have yet."""
    history = [*more, *newest_first(launch.run_dir)][::-1]
    return failing(history, float(launch.profile.get("failing_node_hours", FAILING_NODE_HOURS)))


def kept_off(nodes: Mapping[str, int]) -> str:
    return f"stays off {_named(nodes)}"


def kept_on(nodes: Mapping[str, int], why: str) -> str:
    return f"is not kept off {_named(nodes)}: too few nodes would be left: {why}"


def _named(nodes: Mapping[str, int]) -> str:
    """`n2 (2 starts failed there), n7 (3)`."""
    first, *others = nodes.items()
    said = [f"{first[0]} ({counted(first[1], 'start')} failed there)", *(f"{node} ({n})" for node, n in others)]
    return ", ".join(said)


def keep_off(launch: Launch, job: str, nodes: Mapping[str, int], before: Collection[str]) -> tuple[list[str], str]:
    """Have a waiting job stay off the nodes, unless too few are left, and no longer off those of `before`.

    Returns (the nodes that are left out, a sentence about them; "" if there is nothing to say).
    """
    own = slurm.expand(launch.profile.get("exclude") or "")
    kept, said = list(nodes), kept_off(nodes) if nodes else ""
    try:
        if nodes and (why := slurm.refuses(job, [*own, *nodes])):
            kept, said = [], kept_on(nodes, why)
        if set(kept) != set(before):
            slurm.exclude(job, [*own, *kept])
    except slurm.SlurmError as e:
        return sorted(before), f"is not kept off {_named(nodes)}: {e}" if nodes else ""
    return kept, said
