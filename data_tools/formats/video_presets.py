"""How public human-video datasets lay out their videos and annotations.

A preset finds the annotations below SRC (or takes those given) and lists the segments. People download parts of these
datasets, so an annotation whose video is not there is left out and counted, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.formats.source import walk
from data_tools.formats.video_segments import Segment, around, read_json, read_table, split_of
from stamo_dist.errors import DataError

_MISSING = "{}: no {} below it; say where it is with segments=FILE"


@dataclass(frozen=True)
class Given:
    """What the user gave a preset."""

    src: Path
    videos: Sequence[Path]  # below src
    annotations: Sequence[Path]  # found by the preset where empty
    camera: str  # "" for the preset's own
    window: float  # seconds around a moment


@dataclass(frozen=True)
class Listing:
    """What a preset found."""

    segments: list[Segment]
    files: list[Path]  # annotations
    camera: str = "video"


def ssv2(given: Given) -> Listing:
    """Something-Something v2: ID.webm anywhere below SRC, and the lists something-something-v2-{train,validation,test}.

    A list has {id, label, template, placeholders}; those of the test split have only the id.
    """
    lists = list(given.annotations) or [p for p in walk(given.src) if p.match("*something-v2-*.json")]
    if not lists:
        raise DataError(_MISSING.format(given.src, "something-something-v2-train.json or -validation.json"))
    segments: list[Segment] = []
    for path in lists:
        rows = read_json(path)
        if not isinstance(rows, list):  # ….labels.json: template → class
            continue
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or "id" not in row:
                raise DataError(f"{path}: item {number} has no id")
            template, fillers = str(row.get("template", "")), list(row.get("placeholders") or [])
            segments.append(
                Segment(
                    where=f"{path.name} item {number}",
                    video=str(row["id"]),
                    text=str(row.get("label") or _filled(template, fillers)),
                    id=str(row["id"]),
                    split=split_of(path),
                    task=template.replace("[", "").replace("]", ""),
                    meta={"template": template, "placeholders": fillers} if template else {},
                )
            )
    return Listing(segments, lists)


def _filled(template: str, placeholders: list[str]) -> str:
    """A template such as "Putting [something] on [something]" with its placeholders, in order."""
    fillers = iter(placeholders)
    return re.sub(r"\[[^\]]*\]", lambda match: next(fillers, match[0][1:-1]), template)


def epic(given: Given) -> Listing:
    """EPIC-KITCHENS-100: PARTICIPANT/videos/VIDEO_ID.MP4, and EPIC_100_{train,validation}.csv.

    Its frame numbers belong to one extraction at mixed rates (29.97 to 90 Hz); only the timestamps are used.
    """
    tables = list(given.annotations) or _found(given.src, ("EPIC_100_train.csv", "EPIC_100_validation.csv"))
    if not tables:
        raise DataError(_MISSING.format(given.src, "EPIC_100_train.csv or EPIC_100_validation.csv"))
    rows = [row for path in tables for row in read_table(path, split_of(path))]
    return Listing([replace(row, task=_verb_noun(row.meta)) for row in rows], tables)


def _verb_noun(meta: Mapping[str, Any]) -> str:
    return " ".join(str(meta[key]) for key in ("verb", "noun") if key in meta)


def egodex(given: Given) -> Listing:
    """EgoDex: PART/TASK/I.mp4 with I.hdf5 beside it, whose attributes describe the task.

    llm_description holds; for a reversible task (llm_type) which_llm_description says whether it or llm_description2.
    """
    return Listing([_egodex_segment(path, given.src) for path in given.videos if path.suffix.lower() == ".mp4"], [])


def _egodex_segment(path: Path, src: Path) -> Segment:
    import h5py

    relative = path.relative_to(src)
    pose = path.with_suffix(".hdf5")
    text, meta, fault = "", {}, ""
    try:
        with h5py.File(pose, "r") as file:
            attrs = {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in file.attrs.items()}
        second = attrs.get("llm_type") == "reversible" and attrs.get("which_llm_description") == "2"
        text = (second and attrs.get("llm_description2")) or attrs.get("llm_description", "")
        meta = {k: attrs[k] for k in ("llm_type", "environment", "session_name") if k in attrs}
    except OSError as e:
        fault = (
            f"{pose.name} beside it is missing" if not pose.exists() else f"{pose.name}: not a whole HDF5 file ({e})"
        )
    parts = relative.parts
    return Segment(
        where=relative.as_posix(),
        video=relative.as_posix(),
        text=text,
        id=relative.with_suffix("").as_posix(),
        split="test" if "test" in (src.name, *parts[:-2]) else "train",
        task=parts[-2] if len(parts) > 1 else src.name,
        meta=meta,
        fault=fault,
    )


def egoexo4d(given: Given) -> Listing:
    """Ego-Exo4D: takes.json, and takes/TAKE/frame_aligned_videos/CAMERA.mp4 (or downscaled/448/CAMERA.mp4 below it).

    Camera "ego" is the Aria glasses' RGB stream (aria*_214-1), "exo" the take's best_exo or else its first other
    camera, and a cam_id such as cam02 that camera. A take is one episode, described by its task; given annotations
    keystep_*.json its steps are, given atomic_descriptions_*.json `window` seconds around each description are.
    """
    takes = next((p for p in (given.src / "takes.json", given.src / "metadata" / "takes.json") if p.is_file()), None)
    if takes is None:
        raise DataError(f"{given.src}: no takes.json; download it with `egoexo --parts metadata`")
    camera = given.camera or "ego"
    there = {path.relative_to(given.src).as_posix() for path in given.videos}
    whole = {}
    for number, take in enumerate(read_json(takes), start=1):
        whole[take["take_uid"]] = Segment(
            where=f"{takes.name} item {number}",
            video=_take_video(take, camera, there),
            text=take.get("task_name") or "",
            id=take["take_name"],
            task=take.get("parent_task_name") or "",
            meta={k: take[k] for k in ("take_uid", "university_name", "participant_uid") if k in take},
        )
    if not given.annotations:
        return Listing(list(whole.values()), [takes], camera)
    segments: list[Segment] = []
    for path in given.annotations:
        for uid, about in (read_json(path).get("annotations") or {}).items():
            if uid in whole:
                segments += _parts(whole[uid], _take_moments(about, camera), path, given.window)
    return Listing(segments, [takes, *given.annotations], camera)


def _take_video(take: Mapping[str, Any], camera: str, there: set[str]) -> str:
    """The take's video of this camera, relative to SRC; the downscaled one where only that was downloaded."""
    streams = take.get("frame_aligned_videos") or {}
    exo = sorted(c for c in streams if not c.startswith("aria") and c not in ("collage", "best_exo"))
    if camera == "ego":
        paths = [
            about["rgb"]["relative_path"] for c, about in streams.items() if c.startswith("aria") and "rgb" in about
        ]
    else:
        cam = (take.get("best_exo") or next(iter(exo), "")) if camera == "exo" else camera
        paths = [stream["relative_path"] for stream in streams.get(cam, {}).values() if stream.get("relative_path")]
    for path in paths:
        full = Path(take.get("root_dir") or f"takes/{take['take_name']}") / path
        small = full.parent / "downscaled" / "448" / full.name
        return next((p.as_posix() for p in (full, small) if p.as_posix() in there), full.as_posix())
    return f"{take['take_name']}/{camera}"


def _take_moments(about: Any, camera: str) -> Iterator[Mapping[str, Any]]:
    """Steps or descriptions of a take; of several annotators, the first whose work was accepted."""
    if isinstance(about, Mapping):
        yield from about.get("segments") or []
        return
    accepted: Mapping[str, Any] = next((a for a in about if not a.get("rejected")), {})
    for description in accepted.get("descriptions") or []:
        if camera != "ego" or str(description.get("ego_visible", 1)) not in ("0", "False"):
            yield description


def ego4d(given: Given) -> Listing:
    """Ego4D: VIDEO_UID.mp4 anywhere below SRC, and one of its annotation files.

    narration.json or all_narrations_redacted.json (found where none is given): `window` seconds around each narration
    of the first pass. fho_main.json, moments_*.json, nlq_*.json, goalstep_*.json: their intervals in video time.
    Without any, a video is one episode.
    """
    files = list(given.annotations) or _found(given.src, ("narration.json", "all_narrations_redacted.json"))[:1]
    if not files:
        return Listing([Segment(p.name, p.relative_to(given.src).as_posix(), id=p.stem) for p in given.videos], [])
    segments: list[Segment] = []
    for path in files:
        by_video: dict[str, list[Mapping[str, Any]]] = {}
        for uid, about in _ego4d_moments(read_json(path), ""):
            by_video.setdefault(uid, []).append(about)
        for uid, moments in by_video.items():
            segments += _parts(Segment(where="", video=uid, id=uid), moments, path, given.window)
        if not by_video:
            raise DataError(f"{path}: no texts with times by video in it, as narration.json or moments_train.json have")
    return Listing(segments, files)


def _ego4d_moments(node: Any, uid: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everything with a text and a time in an annotation file, with its video; what lies below such is left out."""
    if isinstance(node, list):
        for item in node:
            yield from _ego4d_moments(item, uid)
        return
    if not isinstance(node, dict):
        return
    uid = node.get("video_uid", uid)
    if any(node.get(flag) for flag in ("is_rejected", "is_invalid_annotation")):
        return
    if uid and _text(node) and _interval(node) != (None, None):
        yield uid, node
        return
    for key, item in node.items():
        if key == "summaries" or (key == "narration_pass_2" and node.get("narration_pass_1")):
            continue
        yield from _ego4d_moments(item, key if _UUID.fullmatch(key) else uid)


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TEXTS = ("narration_text", "step_description", "step_category", "step_name", "label", "query", "text")
#: In seconds of the whole video; Ego4D's other start_* fields may count from a clip's beginning.
_INTERVALS = (
    ("video_start_time", "video_end_time"),
    ("video_start_sec", "video_end_sec"),
    ("start_sec", "end_sec"),
    ("start_time", "end_time"),
)
_MOMENTS = ("timestamp_sec", "timestamp", "time")


def _text(about: Mapping[str, Any]) -> str:
    """What an annotation says, without tags such as #C or #unsure."""
    raw = next((about[key] for key in _TEXTS if isinstance(about.get(key), str) and about[key]), "")
    return re.sub(r"#\w+\s*", "", raw).strip()


def _interval(about: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Start and end; a moment is (moment, None)."""
    known = {key: value for key, value in about.items() if isinstance(value, int | float)}
    for first, last in _INTERVALS:
        if first in known and last in known:
            return float(known[first]), float(known[last])
    return next((float(known[key]) for key in _MOMENTS if key in known), None), None


def _parts(whole: Segment, about: Iterable[Mapping[str, Any]], path: Path, window: float) -> Iterator[Segment]:
    """The segments of one video in order of time, from annotations of intervals and of moments."""
    timed = [(*_interval(one), _text(one)) for one in about]
    known = sorted(((start, end, text) for start, end, text in timed if start is not None), key=lambda one: one[0])
    between = iter(around([start for start, end, _ in known if end is None], window))
    for number, (start, end, text) in enumerate(known, start=1):
        first, last = next(between) if end is None else (start, end)
        yield replace(
            whole,
            where=f"{path.name} {whole.id} {number}",
            start=first,
            end=last,
            text=text,
            id=f"{whole.id}/{number:04d}",
            split=split_of(path),
            fault="" if first < last else f"start {first:g} is not before end {last:g}",
        )


def _found(src: Path, names: Sequence[str]) -> list[Path]:
    files = list(walk(src))
    return [path for name in names for path in files if path.match(name)]


PRESETS: dict[str, Callable[[Given], Listing]] = {
    "ssv2": ssv2,
    "epic": epic,
    "egoexo4d": egoexo4d,
    "ego4d": ego4d,
    "egodex": egodex,
}
