"""Any trained policy by its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stamo_dist.models.openvla.actions import SETTINGS, SeenAs, seen_as
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.rdt_policy import KIND, RDTPolicy

AnyPolicy = Policy | RDTPolicy


def trained_on(path: str | Path) -> dict[str, SeenAs]:
    """How the sources of the policy in a folder came to it, without opening its weights; empty where it is not said."""
    folder = Path(path)
    return seen_as(folder) or seen_as(folder / "model")


def load_policy(path: str | Path, **options: Any) -> AnyPolicy:
    """The policy in a folder: OpenVLA, OpenVLA-OFT or the diffusion transformer; a run's folder means its `model/`.

    `options` are those of its `from_pretrained`, such as `device` and `tokenizer`.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model.
    """
    folder = Path(path)
    settings = next((f / SETTINGS for f in (folder, folder / "model") if (f / SETTINGS).is_file()), None)
    if settings is None:
        return Policy.from_pretrained(path, **options)
    try:
        kind = json.loads(settings.read_text(encoding="utf-8")).get("kind")
    except ValueError:
        kind = None  # the policy's own reader says what is wrong
    return (RDTPolicy if kind == KIND else Policy).from_pretrained(settings.parent, **options)
