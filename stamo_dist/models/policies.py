"""Opening any trained policy by its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla import load
from stamo_dist.models.openvla.actions import SETTINGS, STATISTICS, SeenAs, Statistics, seen_as
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.openvla.policy import Policy, Unsaid
from stamo_dist.models.policy_base import recorded_framing
from stamo_dist.models.rdt_policy import KIND, RDTPolicy
from stamo_dist.pretrained import place
from stamo_dist.pretrained.reading import read_config

AnyPolicy = Policy | RDTPolicy


def trained_on(path: str | Path) -> dict[str, SeenAs]:
    """How a policy saw the frames of its sources in training, without opening its weights; {} if not recorded."""
    folder = Path(path)
    if not folder.exists():
        try:
            folder = load.locate(str(path)).folder
        except CheckpointError:
            return {}  # opening it reports the reason
    return seen_as(folder) or seen_as(folder / "model")


def load_policy(path: str | Path, *, use: Use = AS_RECORDED, **options: Any) -> AnyPolicy:
    """The policy in a folder: OpenVLA, OpenVLA-OFT or the diffusion transformer; a run's folder means its `model/`.

    `use`: settings that its folder may lack; `options`: those of its `from_pretrained`, such as `device` and
    `tokenizer`.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model.
        RunError: neither it nor `use` states how it sees frames, or they contradict each other.
    """
    folder = _with_settings(Path(path)) or place.from_hub(str(path), SETTINGS, load.FIELD)
    if folder is None:
        return _released(str(path), use, options)
    use.check_ours(str(path))
    options["framing"] = use.framing(recorded_framing(folder), str(path), ())
    try:
        kind = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("kind")
    except ValueError:
        kind = None  # the policy's own reader reports what is wrong
    return (RDTPolicy if kind == KIND else Policy).from_pretrained(folder, **options)


def _released(path: str, use: Use, options: dict[str, Any]) -> AnyPolicy:
    found = load.locate(path)
    config = read_config(found.holding("config.json"), "policy", load.FIELD)
    known = Statistics.read(found.holding(STATISTICS), config.get("norm_stats") or {})
    framing = use.framing(None, path, list(known.sources))
    use.check(bool(found.part("action_head")), path)
    unsaid = Unsaid(use.options(), use.actions_at_once)
    return Policy.from_pretrained(path, unsaid=unsaid, framing=framing, **options)


def _with_settings(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "model") if (folder / SETTINGS).is_file()), None)
