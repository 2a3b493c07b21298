"""Which tiny datasets are mutated, and what the result of each may depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_sources import (
    aloha,
    droid_raw,
    ego4d,
    ego4d_moments,
    egodex,
    egoexo4d,
    epic,
    lerobot_groot,
    lerobot_v21,
    lerobot_v30,
    libero,
    maniskill,
    metaworld,
    rlds,
    robomimic,
    ssv2,
    video_json,
    video_table,
    zarr,
    zarr3,
)


@dataclass(frozen=True)
class Tiny:
    """How to make one, what to mutate, and what its values depend on.

    Attributes:
        format: As `stamo data convert` calls it.
        make: Writes it into a new folder.
        mutated: Files whose every field is mutated, relative to the folder.
        options: Of the format; values that begin with "/" are paths below the folder.
        touches: (part of "FILE FIELD/FIELD", what of the result may change with it): "frames", "action", "proprio",
            "time", "text", "episodes" (their names or number), "length".
    """

    format: str
    make: Callable[[Path], Any]
    mutated: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    touches: tuple[tuple[str, str], ...] = ()
    src: str = "."
    #: Fields that a message calls otherwise.
    aliases: Mapping[str, str] = field(default_factory=dict)


#: A parquet's own numbers, and a table's own texts.
_TASKS = {"__index_level_0__": "task texts"}
_LEROBOT = (
    (r"parquet action\S*:(whole numbers|scalars|booleans)", "action"),
    (r"parquet observation.state\S*:(whole numbers|scalars|booleans)", "proprio"),
    (r"episodes.* tasks.*:(numbers|texts)", "text"),
    (r"tasks\.", "text"),
    (r"parquet (task_index|annotation).*:(all alike|one more|backwards|empty|nulls)", "text"),
    (r"videos\S*(chunk|file)_index:", "frames"),
    (r"data/\S*parquet episode_index:backwards", "length"),
    (r"features/annotation\S*:(drop|rename)", "text"),
    (r"modality.json action/\S*/(start|end|original_key):", "action"),
    (r"modality.json state/\S*/(start|end|original_key):", "proprio"),
    (r"parquet timestamp:(huge|one more|fractions|NaN)", "time"),
)
_LIBERO = ((r"problem_info", "text"), (r"turned over", "action proprio"))
_ROBOMIMIC = (
    (r"controller_configs(/type|/output_max)?:", "action"),
    (r"ep_meta|obs/language_instruction|@env_args/lang", "text"),
    (r"turned over", "action proprio"),
)
_MANISKILL = ((r"env_id", "text"), (r"robot_uids|control_mode", "action"), (r"turned over", "action proprio"))
_DROID = (
    (r"observation/timestamp(/cameras|/control|:)", "time"),
    (r"skip_action|observation/timestamp:", "length"),
    (r"aggregated|uuid|current_task|metadata.* :", "text"),
    (r"turned over", "action proprio"),
)
_ROWS = (
    (r":cut at", "episodes text length"),
    (r"(id|narration_id|video|video_id|cuts.json v\d.mp4\S*):", "episodes text length frames"),
    (r"(start|end|stop)(_timestamp)?:", "length"),
    (r"(text|narration|label|labels.json .*|template|placeholders\S*):", "text"),
    (r"labels.json :", "text"),
    (r"row \d:(drop line|item twice)", "episodes"),
    (r"(train|validation).json( 0)?:", "episodes"),
    (r"(whole|header alone|missing|train.json :|validation.json :)", "episodes"),
)
_EGO = (
    (r"take_name|take_uid|takes.json( \d)?:", "episodes text length"),
    (r"frame_aligned|root_dir", "episodes frames length"),
    (r"task_name", "text"),
    (r"annotations/|moments", "episodes text length"),
)
_CSV = {r".": "field larger than", "video_id": "column video"}
_ZARR = ((r"action/0.0 :(missing|a folder|a link)", "action"),)
_OF_ZARR = {"": "cannot be read as zarr's metadata", "shape": "whole numbers", "sh": "pictures (N", "s": " rows; ",
            "comp|codecs|chunk": "cannot be read (", "[a-z]": "does not increase"}  # fmt: skip
_PROPRIO = {"qpos": "proprio"}
TABLE = {"segments": ["/cuts.csv"], "labels": "/labels.json"}
TINY = {
    "lerobot-v21": Tiny(
        "lerobot",
        lerobot_v21,
        ("meta/info.json", "meta/tasks.jsonl", "meta/episodes.jsonl", "data/chunk-000/episode_000001.parquet"),
        touches=_LEROBOT,
    ),
    "lerobot-groot": Tiny(
        "lerobot",
        lerobot_groot,
        (
            "meta/info.json",
            "meta/tasks.jsonl",
            "meta/episodes.jsonl",
            "meta/modality.json",
            "data/chunk-000/episode_000001.parquet",
        ),
        {"action": ["arm", "claw"], "state": ["arm"]},
        touches=_LEROBOT,
    ),
    "lerobot-v30": Tiny(
        "lerobot",
        lerobot_v30,
        (
            "meta/info.json",
            "meta/tasks.parquet",
            "meta/episodes/chunk-000/file-000.parquet",
            "data/chunk-000/file-000.parquet",
        ),
        touches=_LEROBOT,
        aliases=_TASKS,
    ),
    "libero": Tiny("libero", libero, ("open_the_drawer_demo.hdf5",), touches=_LIBERO),
    "metaworld": Tiny("metaworld", metaworld, ("open_the_drawer_demo.hdf5",), touches=_LIBERO),
    "robomimic": Tiny("robomimic", robomimic, ("can.hdf5",), touches=_ROBOMIMIC),
    "aloha": Tiny("aloha", aloha, ("episode_1.hdf5",), aliases=_PROPRIO),
    "aloha-jpeg": Tiny("aloha", lambda root: aloha(root, True), ("episode_0.hdf5", "episode_1.hdf5"), aliases=_PROPRIO),
    "maniskill": Tiny(
        "maniskill",
        maniskill,
        ("PickCube-v1.h5", "PickCube-v1.json"),
        touches=_MANISKILL,
        aliases={"control_mode": "actions differ"},
    ),
    "zarr": Tiny(
        "zarr",
        zarr,
        tuple(
            f"pusht.zarr/{p}"
            for p in (
                ".zgroup",
                "data/.zgroup",
                "meta/.zgroup",
                "data/img/.zarray",
                "data/action/.zarray",
                "data/state/.zarray",
                "data/timestamp/.zarray",
                "meta/episode_ends/.zarray",
                "data/action/0.0",
                "meta/episode_ends/0",
            )
        ),
        {},
        _ZARR,
        "pusht.zarr",
        _OF_ZARR,
    ),
    "zarr-3": Tiny(
        "zarr",
        zarr3,
        tuple(
            f"pusht.zarr/{p}/zarr.json"
            for p in (".", "data", "data/img", "data/action", "data/timestamp", "meta/episode_ends")
        ),
        {},
        _ZARR,
        "pusht.zarr",
        _OF_ZARR,
    ),
    "rlds": Tiny(
        "rlds",
        rlds,
        ("robot/1.0.0/features.json", "robot/1.0.0/dataset_info.json"),
        {"rate_hz": 5, "mode": "other", "proprio": ["observation/state"]},
    ),
    "droid-raw": Tiny(
        "droid-raw",
        droid_raw,
        (
            "aggregated-annotations-030724.json",
            "AUTOLab/success/2023-07-07/episode_0/trajectory.h5",
            "AUTOLab/success/2023-07-07/episode_2/trajectory.h5",
            "AUTOLab/success/2023-07-07/episode_1/metadata_AUTOLab+84bd5053+2023-07-07-09h-42m-21s.json",
        ),
        touches=_DROID,
    ),
    "video-table": Tiny("video", video_table, ("cuts.csv", "labels.json"), TABLE, _ROWS, "raw", _CSV),
    "video-json": Tiny(
        "video",
        video_json,
        ("cuts.json", "labels.json"),
        {"segments": ["/cuts.json"], "labels": "/labels.json"},
        _ROWS,
        "raw",
        {r"^v\d": "item"},
    ),
    "ssv2": Tiny(
        "video",
        ssv2,
        ("something-something-v2-train.json", "something-something-v2-validation.json"),
        {"preset": "ssv2"},
        _ROWS,
    ),
    "epic": Tiny("video", epic, ("EPIC_100_train.csv",), {"preset": "epic"}, _ROWS, aliases=_CSV),
    "egoexo4d": Tiny("video", egoexo4d, ("takes.json",), {"preset": "egoexo4d"}, _EGO),
    "egoexo4d-steps": Tiny(
        "video",
        egoexo4d,
        ("takes.json", "annotations/keystep_val.json", "annotations/atomic_descriptions_val.json"),
        {
            "preset": "egoexo4d",
            "window": 0.4,
            "segments": ["/annotations/keystep_val.json", "/annotations/atomic_descriptions_val.json"],
        },
        _EGO,
    ),
    "ego4d": Tiny(
        "video",
        ego4d,
        ("annotations/narration.json",),
        {"preset": "ego4d", "window": 0.4},
        _EGO,
        aliases={"": "texts with times by video"},
    ),
    "ego4d-moments": Tiny(
        "video",
        ego4d_moments,
        ("moments_train.json",),
        {"preset": "ego4d", "segments": ["/moments_train.json"]},
        _EGO,
        aliases={"": "texts with times by video"},
    ),
    "egodex": Tiny(
        "video", egodex, ("part1/lid/0.hdf5", "part1/lid/1.hdf5"), {"preset": "egodex"}, ((r"llm", "text"),)
    ),
}
