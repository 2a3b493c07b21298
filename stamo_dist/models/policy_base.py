"""Shared by trained policies: acting on one timestep, encoding frames with the state encoder, folder settings."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stamo_dist.errors import CheckpointError, DataError, RunError
from stamo_dist.models.exported import STATE_ENCODER
from stamo_dist.models.openvla.actions import SETTINGS, Statistics
from stamo_dist.models.openvla.framing import Framing, Picture
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.recipe.policy import PolicyConfig

FORMAT = 1


class TrainedPolicy(ABC):
    """Images and an instruction in, actions in the robot's units out."""

    network: Any  # a module, with its `sizes`

    @property
    def chunk(self) -> int:
        """Number of actions predicted at once."""
        return int(self.network.sizes.chunk)

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def act(
        self,
        image: Picture | Sequence[Picture],
        instruction: str,
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
    ) -> np.ndarray:
        """One timestep → (C, A) float64 actions in the units of the source `unnorm_key`.

        `image` is one view or all of them: PIL, or uint8 (H, W, 3). `proprio` (P,) is in the source's units.

        Raises:
            DataError: unknown statistics, a wrong number of views, or proprioception missing or of another size.
        """
        views = [image] if isinstance(image, Image.Image | np.ndarray) else list(image)
        felt = None if proprio is None else np.asarray(proprio)[None]
        return self.act_batch([views], [instruction], unnorm_key=unnorm_key, proprio=felt)[0]

    @abstractmethod
    def act_batch(
        self,
        images: Sequence[Sequence[Picture]],
        instructions: Sequence[str],
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `act`, for B timesteps of one source → (B, C, A); `proprio` is (B, P)."""


def encode_proprio(
    proprio: np.ndarray | None, cfg: PolicyConfig, statistics: Statistics, unnorm_key: str | None, device: torch.device
) -> Tensor | None:
    """(B, P) in the units of the source `unnorm_key` → (B, P) float32 normalised; None if the policy reads none.

    Raises:
        DataError: It is missing or of another size, or the statistics are unknown.
    """
    if not cfg.proprio:
        return None
    if proprio is None:
        raise DataError("this policy reads proprioception: give `proprio`")
    ranges = statistics.range(unnorm_key, "proprio", cfg.bounds)
    return torch.from_numpy(ranges.normalise_proprio(np.asarray(proprio))).float().to(device)


def encode_views(
    vision: StamoVision, cfg: PolicyConfig, images: Sequence[Sequence[Picture]], framing: Framing
) -> Features:
    """The StaMo encoder's features of B timesteps of V views.

    Raises:
        DataError: another number of views, or images of different sizes.
    """
    check_views(cfg, images)
    seen = [framing(view) for views in images for view in views]
    frames = [np.asarray(v.convert("RGB") if isinstance(v, Image.Image) else v) for v in seen]
    if len(shapes := {frame.shape for frame in frames}) > 1:
        raise DataError(f"the images have different sizes: {', '.join(map(str, sorted(shapes)))}")
    batch = torch.from_numpy(np.stack(frames)).unflatten(0, (len(images), cfg.views))
    return vision.read(batch, cfg.stamo)


def check_views(cfg: PolicyConfig, images: Sequence[Sequence[Picture]]) -> None:
    if wrong := {len(views) for views in images} - {cfg.views}:
        raise DataError(f"the policy looks at {cfg.views} views of a moment, not {sorted(wrong)[0]}")


def read_state_encoder(
    folder: Path, cfg: PolicyConfig, tokenizer: str | Path | None, device: torch.device | str
) -> StamoVision | None:
    """The encoder half of the tokenizer through which a policy sees, None if it has vision towers.

    Raises:
        CheckpointError: its location is unknown, or it is not the one the policy was trained with.
    """
    if cfg.vision != "stamo":
        return None
    beside = folder / STATE_ENCODER
    source = tokenizer or (beside if beside.is_dir() else cfg.tokenizer)
    if source is None:
        raise CheckpointError(f"{folder}: the policy sees through a StaMo tokenizer; say where it lies (tokenizer)")
    seeing = StateEncoder.from_pretrained(source)
    expected = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("tokenizer_fingerprint")
    if expected != seeing.fingerprint:
        raise CheckpointError(f"{source}: is not the StaMo tokenizer that {folder} was trained with; give that one")
    return StamoVision(seeing.to(device))


def recorded_framing(folder: Path) -> Framing | None:
    """How a policy trained here sees upright frames; None for other folders.

    Raises:
        CheckpointError: Its settings cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        return Framing.read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RunError) as error:
        raise unreadable(path, error) from error


def folder_settings(
    cfg: PolicyConfig, sizes: Any, statistics: Statistics, framing: Framing, tokenizer_fingerprint: str | None
) -> dict[str, Any]:
    """The common fields of every exported policy's `policy.json`; `sizes`: the dataclass of the network's sizes."""
    return {
        "format": FORMAT,
        "policy": cfg.model_dump(mode="json"),
        "sizes": dataclasses.asdict(sizes),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "framing": framing.to_dict(),
        "sources": {name: dataclasses.asdict(seen) for name, seen in statistics.seen.items()},
    }


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error about an exported policy's folder or file that cannot be read because of `error`."""
    return CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); export it again")
