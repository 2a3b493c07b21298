"""Adding new episodes of a grown dataset to its shards, without rewriting the existing ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_tools.convert.episode import read_digest
from data_tools.convert.merge import some
from data_tools.convert.plan import VAL, ConversionPlan, Settings, split_episodes
from data_tools.convert.progress import ConversionProgress
from data_tools.formats.source import EpisodeRef
from stamo_dist.data.schema import Episode, Manifest, read_episodes
from stamo_dist.errors import DataError


def only_new(plan: ConversionPlan, out: Path, found: Manifest, settings: Settings) -> ConversionPlan:
    """The part of a plan that OUT does not hold yet; `found`: OUT's manifest, converted with the same options.

    Raises:
        DataError: Episodes that OUT holds were removed from the dataset or changed.
    """
    held = {e.id: e for split, of in found.splits.items() for e in read_episodes(out, split, of.episodes)}
    there = {e.id: e for members in plan.splits.values() for e in members}
    changed = [f"{id}: is no longer there" for id in held if id not in there]
    known = [there[id] for id in held if id in there]
    with ConversionProgress(sum(e.length for e in known), 0, settings.quiet, "compare") as progress:
        for episode, problem in _compare(plan, known, held):
            changed += [f"{episode.id}: {problem}"] if problem else []
            progress.show(episode.length, bool(problem))
    if changed:
        head = f"{out}: was converted from a dataset that has changed since, not only grown ({len(changed)} episodes):"
        tail = "choose another OUT, or replace it with --overwrite"
        raise DataError("\n".join([head, *some(changed), tail]))
    fresh = [e for e in there.values() if e.id not in held]
    splits, notes = split_episodes(fresh, settings, fill=VAL not in found.splits) if fresh else ({}, [])
    note = (
        f"the dataset's files have changed since the last conversion; of the {len(known)} episodes that were there the "
        "rows are the same, their frames were not compared (`stamo data check --against` does)"
    )
    manifest = plan.manifest.model_copy(update={"notes": [*plan.manifest.notes, *notes, note]})
    return replace(plan, job=replace(plan.job, manifest=manifest), manifest=manifest, splits=splits, base=found)


def _compare(
    plan: ConversionPlan, known: list[EpisodeRef], held: dict[str, Episode]
) -> Iterator[tuple[EpisodeRef, str]]:
    """Each episode, and what is wrong with it."""
    for episode in known:
        before = held[episode.id].digest
        if not before:
            yield episode, "was converted by a version that did not keep what tells whether it changed"
        elif before != read_digest(plan.job.reader, episode):
            yield episode, "has other rows (times, actions, proprioception or instruction), or cannot be read any more"
        else:
            yield episode, ""
