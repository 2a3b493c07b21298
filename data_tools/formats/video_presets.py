"""How public human-video datasets lay out their videos and annotations.

A preset finds the annotations below SRC (or takes those given) and lists the segments. Often only parts of these
datasets are downloaded, so an annotation whose video is missing is left out and counted, not an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.formats import hdf5
from data_tools.formats.checked import (
    a_list,
    a_text,
    an_object,
    flag,
    list_at,
    object_at,
    read_json,
    read_object,
    shown,
    text_at,
)
from data_tools.formats.source import walk
from data_tools.formats.video_segments import Segment, around, read_table, split_of
from stamo_dist.errors import DataError

_MISSING = "{}: no {} below it; say where it is with segments=FILE"


@dataclass(frozen=True)
class Given:
    """The user's options for a preset."""

    src: Path
    videos: Sequence[Path]  # below src
    annotations: Sequence[Path]  # found by the preset if empty
    camera: str  # "" for the preset's own
    window: float  # seconds around a single timestamp


@dataclass(frozen=True)
class Listing:
    """The segments that a preset found."""

    segments: list[Segment]
    files: list[Path]  # annotations
    camera: str = "video"
    notes: Sequence[str] = ()


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
        if isinstance(rows, dict) and path.stem.endswith("labels"):  # template → class
            continue
        for number, row in enumerate(a_list(rows, str(path)), start=1):
            where = f"{path}, item {number}"
            if not isinstance(row, dict) or "id" not in row:
                raise DataError(f"{path}: item {number} has no id")
            if isinstance(row["id"], bool) or not isinstance(row["id"], str | int) or not str(row["id"]).strip():
                raise DataError(f"{where}, id: must be a text or a number, not {shown(row['id'])}")
            template, label = text_at(row, "template", where), text_at(row, "label", where)
            fillers = [a_text(f, f"{where}, placeholders") for f in list_at(row, "placeholders", where)]
            gaps = len(re.findall(_GAP, template))
            segments.append(
                Segment(
                    where=f"{path.name} item {number}",
                    video=str(row["id"]),
                    text=label or _filled(template, fillers),
                    fault=""
                    if label or gaps == len(fillers)
                    else f"{len(fillers)} placeholders for {gaps} gaps of its template",
                    id=str(row["id"]),
                    split=split_of(path),
                    task=template.replace("[", "").replace("]", ""),
                    meta={"template": template, "placeholders": fillers} if template else {},
                )
            )
    return Listing(segments, lists)


_GAP = r"\[[^\]]*\]"


def _filled(template: str, placeholders: list[str]) -> str:
    """Fill a template such as "Putting [something] on [something]" with its placeholders, in order."""
    fillers = iter(placeholders)
    return re.sub(_GAP, lambda match: next(fillers, match[0][1:-1]), template)


def epic(given: Given) -> Listing:
    """EPIC-KITCHENS-100: PARTICIPANT/videos/VIDEO_ID.MP4, and EPIC_100_{train,validation}.csv.

    Its frame numbers refer to an extraction at mixed rates (29.97 to 90 Hz); only the timestamps are used.
    """
    tables = list(given.annotations) or _found(given.src, ("EPIC_100_train.csv", "EPIC_100_validation.csv"))
    if not tables:
        raise DataError(_MISSING.format(given.src, "EPIC_100_train.csv or EPIC_100_validation.csv"))
    rows = [row for path in tables for row in read_table(path, split_of(path), timed=True)]
    return Listing([replace(row, task=_verb_noun(row.meta)) for row in rows], tables)


def _verb_noun(meta: Mapping[str, Any]) -> str:
    return " ".join(str(meta[key]) for key in ("verb", "noun") if key in meta)


def egodex(given: Given) -> Listing:
    """EgoDex: PART/TASK/I.mp4 with I.hdf5 beside it, whose attributes describe the task.

    llm_description is taken; for a reversible task (llm_type), which_llm_description selects it or llm_description2.
    """
    return Listing([_egodex_segment(path, given.src) for path in given.videos if path.suffix.lower() == ".mp4"], [])


def _egodex_segment(path: Path, src: Path) -> Segment:
    relative = path.relative_to(src)
    pose = path.with_suffix(".hdf5")
    text, fault = "", ""
    meta: dict[str, Any] = {}
    try:
        if not pose.exists():
            raise DataError(f"{pose.name} beside it is missing")
        with hdf5.open_file(pose) as file:
            names = ("llm_type", "llm_description", "llm_description2", "environment", "session_name")
            attrs = {name: said for name in names if (said := hdf5.attribute_text(file, name)) is not None}
            which = str(hdf5.attribute(file, "which_llm_description") or "1")
        if attrs.get("llm_type") == "reversible" and which not in ("1", "2"):
            raise DataError(f"{pose.name}: attribute which_llm_description must be 1 or 2, not {which!r:.40}")
        second = attrs.get("llm_type") == "reversible" and which == "2"
        text = (second and attrs.get("llm_description2")) or attrs.get("llm_description", "")
        meta = {k: attrs[k] for k in ("llm_type", "environment", "session_name") if k in attrs}
    except DataError as e:
        fault = str(e).replace(str(pose), pose.name)
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
    camera, and a cam_id such as cam02 that camera. A take is one episode, described by its task. With annotations
    keystep_*.json each step is an episode; with atomic_descriptions_*.json, `window` seconds around each description.
    """
    takes = next((p for p in (given.src / "takes.json", given.src / "metadata" / "takes.json") if p.is_file()), None)
    if takes is None:
        raise DataError(f"{given.src}: no takes.json; download it with `egoexo --parts metadata`")
    camera = given.camera or "ego"
    there = {path.relative_to(given.src).as_posix() for path in given.videos}
    whole: dict[str, Segment] = {}
    for number, take in enumerate(a_list(read_json(takes), str(takes)), start=1):
        where = f"{takes}, item {number}"
        uid = a_text(an_object(take, where).get("take_uid"), f"{where}, take_uid")
        if uid in whole:
            raise DataError(f"{where}, take_uid: {uid!r} is there twice")
        if not (name := text_at(take, "take_name", where)):
            raise DataError(f"{where}, take_name: missing")
        whole[uid] = Segment(
            where=f"{takes.name} item {number}",
            video=_take_video(take, name, camera, there, where),
            text=text_at(take, "task_name", where),
            id=name,
            task=text_at(take, "parent_task_name", where),
            meta={k: take[k] for k in ("take_uid", "university_name", "participant_uid") if k in take},
        )
    if not given.annotations:
        return Listing(list(whole.values()), [takes], camera)
    segments: list[Segment] = []
    unknown: list[str] = []
    for path in given.annotations:
        for uid, about in an_object(read_object(path).get("annotations"), f"{path}, annotations").items():
            if uid in whole:
                moments = list(_take_moments(about, camera, f"{path}, annotations.{uid}"))
                segments += _parts(whole[uid], moments, path, given.window)
            else:
                unknown.append(uid)
    notes = [f"left out: annotations of {len(unknown)} takes that {takes.name} lacks: {', '.join(unknown[:3])}"]
    return Listing(segments, [takes, *given.annotations], camera, notes if unknown else ())


def _take_video(take: Mapping[str, Any], name: str, camera: str, there: set[str], where: str) -> str:
    """The take's video of this camera, relative to SRC; the downscaled one if only that exists."""
    at = f"{where}, frame_aligned_videos"
    cameras = object_at(take, "frame_aligned_videos", where)
    streams = {
        c: {k: object_at(about, k, f"{at}.{c}") for k in about} for c in cameras if (about := object_at(cameras, c, at))
    }
    exo = sorted(c for c in streams if not c.startswith("aria") and c not in ("collage", "best_exo"))
    if camera == "ego":
        found = [
            (about["rgb"], f"{at}.{c}.rgb") for c, about in streams.items() if c.startswith("aria") and "rgb" in about
        ]
    else:
        cam = (text_at(take, "best_exo", where) or next(iter(exo), "")) if camera == "exo" else camera
        found = [(stream, f"{at}.{cam}.{k}") for k, stream in streams.get(cam, {}).items()]
    for path in (said for stream, place in found if (said := text_at(stream, "relative_path", place))):
        full = Path(text_at(take, "root_dir", where) or f"takes/{name}") / path
        small = full.parent / "downscaled" / "448" / full.name
        return next((p.as_posix() for p in (full, small) if p.as_posix() in there), full.as_posix())
    return f"{name}/{camera}"


def _take_moments(about: Any, camera: str, where: str) -> Iterator[Mapping[str, Any]]:
    """Steps or descriptions of a take; for several annotators, those of the first that was not rejected."""
    if isinstance(about, Mapping):
        for n, segment in enumerate(a_list(about.get("segments"), f"{where}, segments")):
            _check_moment(an_object(segment, f"{where}, segments.{n}"), f"{where}, segments.{n}")
            yield segment
        return
    works = [an_object(a, f"{where}.{n}") for n, a in enumerate(a_list(about, where))]
    accepted = next((a for a in works if not flag(a.get("rejected") or False, f"{where}, rejected")), None)
    if accepted is None:
        return
    for n, description in enumerate(a_list(accepted.get("descriptions"), f"{where}, descriptions")):
        _check_moment(an_object(description, f"{where}, descriptions.{n}"), f"{where}, descriptions.{n}")
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
    lost: list[str] = []
    for path in files:
        by_video: dict[str, list[Mapping[str, Any]]] = {}
        for uid, about in _ego4d_moments(read_json(path), "", f"{path}, "):
            if _text(about) and _interval(about) != (None, None):
                by_video.setdefault(uid, []).append(about)
            else:
                lost.append(f"{path.name} {uid} {_text(about)}".strip())
        for uid, moments in by_video.items():
            segments += _parts(Segment(where="", video=uid, id=uid), moments, path, given.window)
        if not by_video:
            raise DataError(f"{path}: no texts with times by video in it, as narration.json or moments_train.json have")
    notes = [f"left out: {len(lost)} annotations without a text or without a time: {', '.join(lost[:3])}"]
    return Listing(segments, files, notes=notes if lost else ())


def _ego4d_moments(node: Any, uid: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All objects with a text and a time in an annotation file, with their video; objects nested in such are left out.

    Also objects that have only a text or only a time, and nothing nested.
    """
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from _ego4d_moments(item, uid, f"{where}.{number}")
        return
    if not isinstance(node, dict):
        return
    if "video_uid" in node and not (uid := text_at(node, "video_uid", where)):
        raise DataError(f"{where}, video_uid: must name a video")
    for key in _EGO4D:
        if not isinstance(node.get(key), list | dict | None):
            raise DataError(f"{where}, {key}: must hold annotations, not {shown(node[key])}")
        for number, item in enumerate(node[key] if isinstance(node.get(key), list) else ()):
            an_object(item, f"{where}, {key}.{number}")
    if any(node.get(flag) for flag in ("is_rejected", "is_invalid_annotation")):
        return
    whole = bool(_text(node)) and _interval(node) != (None, None)
    alone = not any(isinstance(item, list | dict) and item for key, item in node.items() if key not in _SAID)
    if uid and any(key in node for key in _TEXTS) and any(key in node for key in _SAID):
        _check_moment(node, where)
    if uid and (whole or (alone and any(key in node for key in (*_TEXTS, *_MOMENTS)))):
        yield uid, node
        return
    for key, item in node.items():
        if key == "summaries" or (key == "narration_pass_2" and node.get("narration_pass_1")):
            continue
        if _UUID.fullmatch(key):
            an_object(item, f"{where}{key}")
        yield from _ego4d_moments(item, key if _UUID.fullmatch(key) else uid, f"{where}.{key}".replace(", .", ", "))


#: Keys of Ego4D's files that hold annotations: lists of objects, or objects.
_EGO4D = ("narration_pass_1", "narration_pass_2", "narrations", "videos", "clips", "annotations", "labels", "segments",
          "annotated_intervals", "narrated_actions", "language_queries")  # fmt: skip
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
_SAID = (*(key for pair in _INTERVALS for key in pair), *_MOMENTS)


def _number(value: Any) -> float | None:
    """A finite number, also given as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return number if math.isfinite(number := float(value)) else None
    return None


def _text(about: Mapping[str, Any]) -> str:
    """An annotation's text without tags such as #C or #unsure."""
    raw = next((about[key] for key in _TEXTS if isinstance(about.get(key), str) and about[key]), "")
    return re.sub(r"#\w+\s*", "", raw).strip()


def _check_moment(about: Mapping[str, Any], where: str) -> None:
    """Raises:
    DataError: A text is not a string, or a time not a number.
    """
    for key in _TEXTS:
        text_at(about, key, where)
    for key in _SAID:
        if about.get(key) is not None and _number(about[key]) is None:
            raise DataError(f"{where}, {key}: must be a number of seconds, not {shown(about[key])}")


def _interval(about: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Start and end; a single timestamp gives (time, None)."""
    known = {key: value for key in _SAID if (value := _number(about.get(key))) is not None}
    for first, last in _INTERVALS:
        if first in known and last in known:
            return float(known[first]), float(known[last])
    return next((float(known[key]) for key in _MOMENTS if key in known), None), None


def _parts(whole: Segment, about: Iterable[Mapping[str, Any]], path: Path, window: float) -> Iterator[Segment]:
    """The segments of one video in order of time, from annotated intervals and single timestamps."""
    timed = [(*_interval(one), _text(one), one) for one in about]
    unknown = [one for start, _, _, one in timed if start is None]
    known = sorted(((start, end, text) for start, end, text, _ in timed if start is not None), key=lambda one: one[0])
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
            fault="" if 0 <= first < last else f"start {first:g} is not before end {last:g}, both from 0 on",
        )
    for number, about_ in enumerate(unknown, start=len(known) + 1):
        said = ", ".join(f"{key} {shown(about_[key])}" for key in _SAID if key in about_) or "nothing"
        yield replace(
            whole,
            where=f"{path.name} {whole.id} {number}",
            text=_text(about_),
            id=f"{whole.id}/{number:04d}",
            fault=f"{path.name}: no time (start_time and end_time, or timestamp) in it; it says {said}",
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
