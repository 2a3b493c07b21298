"""Choosing and verifying the checkpoint that a run starts from.

A checkpoint is `checkpoints/step_00000123/`: written under a temporary name, synced, renamed, and completed by
`checkpoint.json`, which lists every file with its size and checksum. All files are verified before any is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stamo_dist.checkpoint.compatibility import RunFingerprint, growth_of, order_of
from stamo_dist.checkpoint.manifest import Checkpoint, damage, damaged, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import named as named_checkpoint
from stamo_dist.checkpoint.retention import scan, set_aside
from stamo_dist.distributed.collectives import broadcast, gather, on_main
from stamo_dist.distributed.rank import World
from stamo_dist.errors import CheckpointError, RunError


@dataclass(frozen=True)
class RecordedInputs:
    """The weights, data growth and order that a run began with, as recorded in its checkpoint."""

    sources: Mapping[str, str] = field(default_factory=dict)  # recipe field → location of its weights
    growth: Mapping[str, list[int]] = field(default_factory=dict)  # source → growths of each folder
    order: str | None = None  # data.shuffle.order
    holds_all: bool = True  # also weights that are not trained
    step: int | None = None  # of the checkpoint; None without one


@dataclass
class ResumePoint:
    """The checkpoint a run starts from, None for a fresh start, and notes for the user on the choice."""

    checkpoint: Checkpoint | None
    notes: list[str] = field(default_factory=list)
    named: bool = False  # by the user: there is no fallback

    @property
    def path(self) -> Path | None:
        return self.checkpoint.path if self.checkpoint else None

    @property
    def begun(self) -> RecordedInputs:
        if self.checkpoint is None:
            return RecordedInputs()
        manifest = self.checkpoint.manifest
        return RecordedInputs(
            manifest.sources,
            growth_of(manifest.recipe),
            order_of(manifest.recipe),
            manifest.holds_all,
            manifest.state.step,
        )


def select_checkpoint(
    checkpoints: Path,
    resume: str,
    fingerprint: RunFingerprint | None = None,
    *,
    allowed: frozenset[str] = frozenset(),
    without: frozenset[Path] = frozenset(),
) -> ResumePoint:
    """Choose a checkpoint by names, manifests and sizes; writes nothing.

    Args:
        checkpoints: The run's own checkpoints.
        resume: "auto": the newest complete one; "none": there must be none; "best": the run's best by success; else
            the path of a checkpoint or a run.
        fingerprint: The recipe's; None accepts any checkpoint.
        allowed: Flags of the command line that permit differences.
        without: Checkpoints known to be damaged.

    Raises:
        RunError: "none" in a folder with checkpoints, a path that is not a run, a run without checkpoints, or another
            stage, model or mixture.
        CheckpointError: The named checkpoint is incomplete, or the newest one has another format.
    """
    named = False
    if "://" in resume:
        raise RunError(f"--resume {resume}: copy it here first (stamo sync {resume} FOLDER), and give its folder")
    if resume in ("auto", "none"):
        folder = checkpoints
    else:
        given = named_checkpoint(checkpoints, resume) if resume == "best" else Path(resume)
        named = not (given / "checkpoints").is_dir()
        folder = given.parent if named else given / "checkpoints"
    if named:
        if not given.is_dir():
            raise RunError(f"--resume {resume}: there is no such checkpoint or run; give auto, none or the path of one")
        whole, notes = [Checkpoint(given, read_checkpoint_manifest(given))], list[str]()
    else:
        found = scan(folder)
        whole = [checkpoint for checkpoint in found.whole if checkpoint.path not in without]
        newest = whole[0][0].name if whole else ""
        if found.foreign and found.foreign[0][0].name > newest:
            raise CheckpointError(found.foreign[0][1])
        notes = [f"DAMAGED CHECKPOINT, not used: {why}" for path, why in found.corrupt if path.name > newest]
        if not whole and resume not in ("auto", "none"):
            raise RunError("\n  ".join([f"--resume {resume}: the run holds no whole checkpoint", *notes]))
        if whole and resume == "none":
            raise RunError(f"{checkpoints}: holds {newest}; choose another run_dir or --resume auto")
    if not whole:
        return ResumePoint(None, notes)
    path, manifest = whole[0]
    if fingerprint is not None:
        samples = manifest.state.cursor.get("samples", 0)
        fingerprint.check(manifest.fingerprint, manifest.recipe, str(path), allowed, samples)
    return ResumePoint(whole[0], notes, named)


def growth_of_run(run: Path) -> Mapping[str, list[int]]:
    """How many times each source's folders had grown, by the newest complete checkpoint; {} without one."""
    whole = scan(run / "checkpoints").whole
    return growth_of(whole[0][1].recipe) if whole else {}


def verify_or_fall_back(
    checkpoints: Path, world: World, choose: Callable[[frozenset[Path]], ResumePoint]
) -> tuple[Checkpoint | None, list[str]]:
    """Verify the files of the chosen checkpoint, divided over the processes, and fall back while it is damaged.

    Every process calls it; rank 0 calls `choose`, given the checkpoints to leave out, and sends the manifest to the
    others. Damaged ones in `checkpoints`, the run's own, are renamed. Returns the checkpoint to load and notes for
    the user.

    Raises:
        CheckpointError: The user named this one, and it is damaged.
        StamoError: Raised by `choose`.
    """
    notes: list[str] = []
    bad: set[Path] = set()

    def next_choice(damaged_files: list[str]) -> ResumePoint:
        assert choice.path is not None, "only a checkpoint can be damaged"
        error = damaged(choice.path, damaged_files)
        if choice.named:
            raise error
        bad.add(choice.path)
        notes.append(f"DAMAGED CHECKPOINT, not used: {error}")
        return choose(frozenset(bad))

    choice = on_main(world, lambda: choose(frozenset()))
    while choice.checkpoint is not None:
        shares = gather(damage(*choice.checkpoint, world.rank, world.size))
        wrong = broadcast([name for share in shares or () for name in share])
        if not wrong:
            break
        choice = on_main(world, lambda wrong=wrong: next_choice(wrong))  # type: ignore[misc]
    if world.is_main:
        notes = [*choice.notes, *notes, *_put_aside(checkpoints, choice.checkpoint, bad)]
    return choice.checkpoint, notes


def _put_aside(checkpoints: Path, chosen: Checkpoint | None, bad: set[Path]) -> list[str]:
    """Rename damaged checkpoints and those newer than the one to load; returns notes for the user."""
    found = scan(checkpoints)
    corrupt = [p for p, _ in found.corrupt] + [p for p in bad if p.parent == checkpoints]
    notes = [f"kept {p} as {set_aside(p, 'corrupt').name}; delete it when nobody wants to look at it" for p in corrupt]
    step = chosen.manifest.state.step if chosen else 0
    for later, manifest in found.whole:
        if manifest.state.step > step and later not in bad:
            new = set_aside(later, "abandoned")
            notes.append(f"kept {later} as {new.name}: this run goes on from before it and writes its own")
    return notes
