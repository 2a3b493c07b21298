"""The rules of one shard: what must hold for its columns and frames, and what is plausible."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_tools.look.check_report import ERROR, WARNING, CheckFinding
from data_tools.look.columns import ColumnShard
from stamo_dist.data.schema import Manifest, columns
from stamo_dist.errors import DataError

#: A gap of more periods than this between two frames is a jump.
JUMP = 3.0
#: Relative deviation of an episode's rate from the manifest's that is accepted.
RATE_TOLERANCE = 0.1
#: A frame is black if no pixel is brighter than this, and of one colour if no channel varies more than that (of 255).
BLACK, ONE_COLOUR = 32, 8
#: An episode is frozen if this share of its frames equals the one before, or so many seconds of them in a row.
FROZEN_SHARE, FROZEN_SECONDS = 0.5, 2.0
#: Distance by which the gripper may leave 0 … 1.
GRIPPER_SLACK = 0.05
#: Frames per episode checked with `fast`.
SAMPLED = 3
VECTORS = ("action", "original_action", "proprio")


@dataclass(frozen=True)
class EpisodeRun:
    """Consecutive samples of a shard with one episode id: `first` … `first + length - 1`."""

    episode: str
    first: int
    length: int


@dataclass(frozen=True)
class EpisodeRow:
    """One line of episodes.jsonl."""

    id: str
    start: int
    length: int
    instructions: Mapping[int, str]  # first frame → instruction from there on


def runs_of(shard: ColumnShard) -> list[EpisodeRun]:
    """The episodes of a shard according to its samples."""
    ids = shard.values("episode")
    edges = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)] if ids else [0]
    return [EpisodeRun(ids[a].decode(errors="replace"), a, b - a) for a, b in itertools.pairwise(edges)]


def check_columns(names: Sequence[str], encodings: Sequence[str], manifest: Manifest) -> Iterator[str]:
    """How a shard's columns differ from the schema's."""
    dims = (manifest.action_dim, manifest.original_action_dim, manifest.proprio_dim)
    expected = columns(action=dims[0], original_action=dims[1], proprio=dims[2])
    found = dict(zip(names, encodings, strict=True))
    for name, encoding in expected.items():
        if name not in found:
            yield f"has no column {name}"
        elif found[name] != encoding:
            yield f"column {name} is {found[name]}, but the manifest's dimensions make it {encoding}"


def check_layout(
    shard: ColumnShard,
    runs: Sequence[EpisodeRun],
    manifest: Manifest,
    camera: str,
    begin: int,
    rows: Sequence[EpisodeRow] | None,
) -> Iterator[CheckFinding]:
    """Check that t and length are consistent within each episode, and that episodes match the episode table.

    Args:
        shard: A shard.
        runs: The shard's episodes.
        manifest: The source's.
        camera: The shard's camera.
        begin: Number of the shard's first sample in the split.
        rows: The lines of episodes.jsonl that overlap it; None if that file is broken.
    """
    t, length = shard.vectors("t")[:, 0], shard.vectors("length")[:, 0]
    said = {"source": manifest.name, "camera": camera, "convention": manifest.convention}
    told = {name: shard.values(name) for name in said}
    for run in runs:
        here = slice(run.first, run.first + run.length)
        wrong = np.flatnonzero(t[here] != np.arange(run.length))
        if len(wrong):
            frame = int(t[here][wrong[0]])
            text = f"sample {run.first + wrong[0]} has t {frame}, expected {wrong[0]}: not contiguous, or split"
            yield CheckFinding("episode", ERROR, text, episode=run.episode, frame=frame, count=len(wrong))
        wrong = np.flatnonzero(length[here] != run.length)
        if len(wrong):
            text = f"says it has {int(length[here][wrong[0]])} frames, but {run.length} are here"
            yield CheckFinding("episode", ERROR, text, episode=run.episode, count=1)
        for name, expected in said.items():
            if any(value != expected.encode() for value in told[name][here]):
                text = f"its {name} is {told[name][run.first].decode(errors='replace')!r}, the manifest's {expected!r}"
                yield CheckFinding("episode", ERROR, text, episode=run.episode)
    if rows is not None:
        yield from _check_rows(shard, runs, begin, rows)


def _check_rows(
    shard: ColumnShard, runs: Sequence[EpisodeRun], begin: int, rows: Sequence[EpisodeRow]
) -> Iterator[CheckFinding]:
    end = begin + len(shard)
    found = {(run.episode, begin + run.first, run.length): run.first for run in runs}
    for row in rows:
        first = found.get((row.id, row.start, row.length))
        if row.start < begin or row.start + row.length > end:
            inside = min(end, row.start + row.length) - max(begin, row.start)
            text = f"is split over shards: {inside} of its {row.length} frames are in this one"
            yield CheckFinding("episode", ERROR, text, episode=row.id)
        elif first is None:
            last = row.start + row.length - 1
            text = f"episodes.jsonl has it at samples {row.start} to {last} of the split, where this shard has another"
            yield CheckFinding("episode", ERROR, text, episode=row.id)
        else:
            for t, instruction in row.instructions.items():
                if t >= row.length or shard.shard.bytes(first + t, "instruction") != instruction.encode():
                    text = f"episodes.jsonl gives frame {t} the instruction {instruction!r}, this shard does not"
                    yield CheckFinding("episode", ERROR, text, episode=row.id)


def check_numbers(shard: ColumnShard, runs: Sequence[EpisodeRun], names: Sequence[str]) -> Iterator[CheckFinding]:
    """Check that vectors and times are finite."""
    owner = _owners(runs, len(shard))
    for name in names:
        bad = np.flatnonzero(~np.isfinite(shard.vectors(name).astype(np.float64)).all(1))
        if len(bad):
            run = runs[owner[bad[0]]]
            text = f"{name} is NaN or infinite" + (f", and in {len(bad) - 1} other frames" if len(bad) > 1 else "")
            frame = int(bad[0]) - run.first
            yield CheckFinding("number", ERROR, text, episode=run.episode, frame=frame, count=len(bad))


def _owners(runs: Sequence[EpisodeRun], samples: int) -> NDArray[np.int64]:
    """Which run each sample belongs to."""
    return np.repeat(np.arange(len(runs)), [run.length for run in runs])[:samples]


def check_times(shard: ColumnShard, runs: Sequence[EpisodeRun], rate_hz: float) -> Iterator[CheckFinding]:
    """Check that times increase without jumps at the stated rate."""
    times = shard.vectors("time")[:, 0].astype(np.float64)
    period = 1 / rate_hz if rate_hz > 0 else np.inf
    for run in runs:
        steps = np.diff(times[run.first : run.first + run.length])
        if not np.isfinite(steps).all() or not len(steps):
            continue
        back = np.flatnonzero(steps <= 0)
        if len(back):
            text = f"time {'stands still' if steps[back[0]] == 0 else 'goes back'} after it, by {-steps[back[0]]:.3g} s"
            yield CheckFinding("time", ERROR, text, episode=run.episode, frame=int(back[0]), count=len(back))
            continue
        jumps = np.flatnonzero(steps > JUMP * period)
        if len(jumps):
            text = f"{steps[jumps[0]]:.3g} s until the next frame, {steps[jumps[0]] / period:.1f} periods"
            yield CheckFinding("time", WARNING, text, episode=run.episode, frame=int(jumps[0]), count=len(jumps))
        even = np.delete(steps, jumps)
        # Frames resampled from a faster video vary in distance but have the right mean; a rare gap moves only the mean.
        rates = [1 / even.mean(), 1 / np.median(even)] if len(even) else []
        if rates and all(abs(rate / rate_hz - 1) > RATE_TOLERANCE for rate in rates):
            text = f"{rates[0]:.3g} frames a second, the manifest says {rate_hz:g}"
            yield CheckFinding("time", WARNING, text, episode=run.episode)


def check_gripper(shard: ColumnShard, runs: Sequence[EpisodeRun], gripper: int | None) -> Iterator[CheckFinding]:
    """Check that the gripper is between 0 (closed) and 1 (open)."""
    if gripper is None:
        return
    values = shard.vectors("action")[:, gripper].astype(np.float64)
    bad = np.flatnonzero((values < -GRIPPER_SLACK) | (values > 1 + GRIPPER_SLACK))
    if len(bad):
        run = runs[_owners(runs, len(shard))[bad[0]]]
        text = f"gripper (dimension {gripper}) is {values[bad[0]]:.3g}, but 1 is open and 0 closed"
        frame = int(bad[0]) - run.first
        yield CheckFinding("action", WARNING, text, episode=run.episode, frame=frame, count=len(bad))


def chosen_frames(runs: Sequence[EpisodeRun], fast: bool) -> list[int]:
    """The samples whose frames are decoded: all, or SAMPLED of every episode, its first and last among them."""
    if not fast:
        return list(range(sum(run.length for run in runs)))
    picks = (np.linspace(run.first, run.first + run.length - 1, min(SAMPLED, run.length)) for run in runs)
    return [int(i) for pick in picks for i in np.round(pick)]


def check_frames(
    shard: ColumnShard, runs: Sequence[EpisodeRun], chosen: Sequence[int], size: int
) -> Iterator[CheckFinding]:
    """Check that frames decode at the stated size and are not black or uniform; one finding per episode and kind."""
    owner = _owners(runs, len(shard))
    out = np.empty((size, size, 3), np.uint8)
    first: dict[tuple[int, str, str], CheckFinding] = {}
    looked = np.bincount(owner[np.array(chosen, int)], minlength=len(runs))
    for i in chosen:
        if (fault := _fault(shard, i, out)) is None:
            continue
        check, severity, text = fault
        run, key = runs[owner[i]], (int(owner[i]), check, severity)
        if key in first:
            first[key] = replace(first[key], count=first[key].count + 1)
        else:
            first[key] = CheckFinding(check, severity, text, episode=run.episode, frame=i - run.first)
    for (n, _, _), finding in first.items():
        more = f"; so are {finding.count} of the {looked[n]} frames looked at" if finding.count > 1 else ""
        yield replace(finding, text=finding.text + more)


def _fault(shard: ColumnShard, i: int, out: NDArray[np.uint8]) -> tuple[str, str, str] | None:
    data = shard.shard.bytes(i, "image")
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != out.shape[:2]:
            return "frame", ERROR, f"is {width} × {height} px, the manifest says {out.shape[1]} × {out.shape[0]}"
        shard.shard.frame(i, out)
    except (ValueError, DataError) as e:
        reason = str(e).rsplit(": ", 1)[-1] or type(e).__name__
        return "frame", ERROR, f"is not a whole JPEG ({reason})"
    if out.max() <= BLACK:
        return "blank", WARNING, "is black"
    low, high = out.min((0, 1)).astype(int), out.max((0, 1)).astype(int)
    return ("blank", WARNING, "is of one colour") if (high - low).max() <= ONE_COLOUR else None


def check_frozen(shard: ColumnShard, runs: Sequence[EpisodeRun], fast: bool, rate_hz: float) -> Iterator[CheckFinding]:
    """Find consecutive frames with identical JPEG bytes; with `fast`, SAMPLED pairs per episode are compared."""
    begins, ends = (edge.tolist() for edge in shard.spans("image"))
    sizes = np.subtract(ends, begins)
    for run in runs:
        if run.length < 2:
            continue
        pairs = np.arange(run.first + 1, run.first + run.length)
        if fast:
            pairs = np.unique(np.linspace(pairs[0], pairs[-1], SAMPLED).round().astype(int))
        image = partial(shard.shard.bytes, column="image")
        same = np.array([sizes[i] == sizes[i - 1] and image(i) == image(i - 1) for i in pairs])
        longest, end = _longest(same)
        share = same.mean()
        long = not fast and rate_hz > 0 and longest >= max(2, FROZEN_SECONDS * rate_hz)
        if share >= FROZEN_SHARE or long:
            frame = int(pairs[end - longest]) - run.first - 1
            what = "sampled pairs of frames" if fast else "frames"
            text = f"{100 * share:.0f} % of its {what} equal the one before; {longest} in a row from here"
            yield CheckFinding("frozen", WARNING, text, episode=run.episode, frame=frame)


def _longest(same: NDArray[np.bool_]) -> tuple[int, int]:
    """Length of the longest run of True, and its end."""
    best = end = length = 0
    for i, value in enumerate(same.tolist()):
        length = length + 1 if value else 0
        if length > best:
            best, end = length, i + 1
    return best, end


def fingerprints(shard: ColumnShard, runs: Sequence[EpisodeRun]) -> NDArray[np.uint64]:
    """A hash of each episode's first, middle and last JPEG and all its actions; equal for duplicates."""
    actions = shard.vectors("action") if "action" in shard.spec.layout.names else np.empty((len(shard), 0), np.float32)
    out = np.empty(len(runs), np.uint64)
    for n, run in enumerate(runs):
        digest = hashlib.blake2b(actions[run.first : run.first + run.length].tobytes(), digest_size=8)
        for i in (run.first, run.first + run.length // 2, run.first + run.length - 1):
            digest.update(shard.shard.bytes(i, "image"))
        out[n] = int.from_bytes(digest.digest(), "little")
    return out
