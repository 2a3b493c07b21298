"""Reading an exported tokenizer's folder: its `stamo.json` and single parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.encoder import Encoder
from stamo_dist.pretrained import place
from stamo_dist.recipe import schema

FORMAT = 1
ABOUT = "stamo.json"
STATE_ENCODER = "state_encoder"
"""Subfolder of a policy's export with the encoder half of the tokenizer that it sees through."""


def read_encoder(root: Path, cfg: schema.Model, encoder_weights: str | None = None) -> Encoder:
    """The encoder of the tokenizer exported to `root`, or the frozen one it was trained with, from its own location if
    the export lacks it.

    Raises:
        CheckpointError: files are missing or corrupt.
    """
    if cfg.encoder.train or (encoder_weights is None and (root / "encoder").is_dir()):
        return Encoder.from_folder(root / "encoder", cfg.encoder.image_size, cfg.encoder.output)
    source = {"weights": encoder_weights} if encoder_weights else {}
    return Encoder.from_config(cfg.encoder.model_copy(update=source))


def read_compressor(root: Path, cfg: schema.Model, dim: int) -> Compressor:
    """The compressor of the tokenizer exported to `root`, for patch tokens of dimension `dim`.

    Raises:
        CheckpointError: files are missing or corrupt.
    """
    stored = weights.folder(root / "compressor", str(root))
    return weights.load(lambda: Compressor(cfg.compressor, dim), stored)[0]


def exported(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an exported tokenizer, and the content of its `stamo.json`.

    `folder` may be a run, whose `model/` it is, or a hub id, which is downloaded.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    root = next((p for p in (Path(folder), Path(folder) / "model") if (p / ABOUT).is_file()), None)
    root = root or place.from_hub(str(folder), ABOUT, "tokenizer")
    if root is None:
        raise CheckpointError(
            f"{folder}: holds no {ABOUT}, nor does its model/; give a folder with an exported tokenizer, or its hub id"
        )
    return root, _read_about(root / ABOUT)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {about['format']}, this version reads {FORMAT}; export it again")
        recorded = {key: about.get(key) for key in ("fingerprint", "sees")}  # missing in the first exports
        return {**{key: about[key] for key in ("image_size", "model", "flow", "frozen")}, **recorded}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); export it again") from error


def check_parts(found: Mapping[str, str], expected: Mapping[str, str], root: Path) -> None:
    """Compare the fingerprints of a tokenizer's parts with those its export recorded.

    Raises:
        CheckpointError: A fingerprint differs.
    """
    for name, fingerprint in found.items():
        if expected.get(name) != fingerprint:
            raise CheckpointError(
                f"{root}: the {name} is not the one this tokenizer was trained with (fingerprint {fingerprint[:12]}, "
                f"expected {str(expected.get(name))[:12]}); give the original weights"
            )
