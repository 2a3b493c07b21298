"""Judging where the ranks were put, and with which variables of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from stamo_dist.launch.affinity import long
from stamo_dist.launch.doctor.probe import NETWORK, Report
from stamo_dist.launch.doctor.verdict import Finding

_NODES, _NET = "Nodes", "Network between ranks"


def judge_placement(reports: Sequence[Report], asked: Mapping[str, str]) -> Iterator[Finding]:
    """Findings on the ranks' CPUs and their variables; `asked`: the environment that the profile asks for."""
    yield from _far(reports)
    yield from _crowded(reports)
    yield from _variables([r for r in reports if r.local_rank == 0], asked)


def _far(reports: Sequence[Report]) -> Iterator[Finding]:
    """Ranks none of whose CPUs are beside their GPU; one finding for all."""
    far = [r for r in reports if r.beside and not long(r.may_use) & long(r.beside)]
    if far:
        r = far[0]
        what = (
            f"{len(far)} of {len(reports)} ranks run away from their GPU: rank {r.rank} @ {r.host} on the CPUs "
            f"{r.may_use}, and its GPU is beside {r.beside}"
        )
        fix = "cpu_bind: gpu in the profile, or srun: [--distribution=block:block]"
        yield Finding("warning", _NODES, what, fix)
    elif known := [r for r in reports if r.beside]:
        yield Finding("fine", _NODES, f"{len(known)} ranks run on CPUs beside their GPU")


def _crowded(reports: Sequence[Report]) -> Iterator[Finding]:
    """Ranks of a node that share fewer CPUs than they are."""
    for r in reports:
        together = [o.rank for o in reports if o.host == r.host and o.may_use == r.may_use]
        if r.rank == together[0] and 0 < len(long(r.may_use)) < len(together):
            what = f"{r.host}: {len(together)} ranks share the CPUs {r.may_use}"
            fix = "raise cpus_per_gpu in the profile; srun: [--cpu-bind=none] where Slurm binds them so"
            yield Finding("warning", _NODES, what, fix)


def _variables(first: Sequence[Report], asked: Mapping[str, str]) -> Iterator[Finding]:
    """What NCCL and gloo are told, where nodes are told otherwise, and where the profile is not heard."""
    if not first:
        return
    reference = first[0]
    for r in first:
        for name, value in asked.items():
            if name.startswith(NETWORK) and r.network.get(name) != value:
                what = f"{r.host}: {name} is {r.network.get(name, 'not set')}, and the profile says {value}"
                fix = "a setup line, a module or the container's image sets it otherwise; take it out there"
                yield Finding("warning", _NET, what, fix)
        names = sorted(n for n in {*reference.network, *r.network} if reference.network.get(n) != r.network.get(n))
        if names:
            listed = ", ".join(f"{n} {reference.network.get(n)} ≠ {r.network.get(n)}" for n in names)
            what = f"{reference.host} and {r.host} have other variables: {listed}"
            fix = "say them in the profile's environment, which all nodes get"
            yield Finding("warning", _NET, what, fix)
    told = " ".join(f"{name}={value}" for name, value in reference.network.items())
    yield Finding("fine", _NET, f"variables of the network: {told or 'none is set'}")
