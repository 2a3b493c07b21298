"""A trained policy for use: images and an instruction in, actions in the robot's units out."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from stamo_dist.errors import CheckpointError, DataError
from stamo_dist.models.openvla import load
from stamo_dist.models.openvla.actions import SETTINGS, STATISTICS, ActionTokenizer, Statistics
from stamo_dist.models.openvla.config import OpenVLAConfig
from stamo_dist.models.openvla.framing import AS_IT_IS, Framing, Picture
from stamo_dist.models.openvla.images import PREPROCESSOR, ImageProcessor
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.openvla.text import TOKENIZER, Encoded, TextTokenizer
from stamo_dist.models.policy_base import (
    FORMAT,
    TrainedPolicy,
    check_views,
    encode_proprio,
    encode_views,
    read_state_encoder,
    recorded_framing,
    unreadable,
)
from stamo_dist.recipe import policy as recipe

log = logging.getLogger(__name__)

# (action dim, proprioception dim) → chunk, views and bounds of OFT's three robots, which checkpoints do not record.
_PLATFORMS: dict[tuple[int, int], tuple[int, int, recipe.Bounds]] = {
    (7, 8): (8, 2, "q99"),  # LIBERO
    (14, 14): (25, 3, "minmax"),  # ALOHA
    (7, 7): (5, 1, "q99"),  # Bridge
}


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """Settings that a folder may lack, or that override it.

    Attributes:
        options: Fields of recipe.policy.PolicyConfig, such as {"views": 2} or {"actions": "parallel_tokens"} for an OFT
            folder.
        chunk: Actions predicted at once.
        tower_options: Passed to timm, for towers of another size.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chunk: int | None = None
    tower_options: Sequence[Mapping[str, Any]] = ()


AS_IT_SAYS = Unsaid()


@dataclasses.dataclass
class Policy(TrainedPolicy):
    """A network with everything needed for inference; `from_pretrained` builds it."""

    network: PolicyNetwork
    text: TextTokenizer
    processor: ImageProcessor
    statistics: Statistics
    vision: StamoVision | None = None
    framing: Framing = AS_IT_IS  # how upright frames are transformed

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        tokenizer: str | Path | None = None,
        text: TextTokenizer | None = None,
        unsaid: Unsaid = AS_IT_SAYS,
        framing: Framing | None = None,
    ) -> Policy:
        """Read a checkpoint: ours, openvla/openvla-7b's layout, OpenVLA-OFT's or a PEFT adapter; a folder or a hub id.

        Args:
            path: The folder or hub id.
            dtype: Of the weights; that of config.json when omitted.
            tokenizer: Where the StaMo tokenizer lies on this machine, for policies that see through it.
            text: Text tokenizer that replaces the folder's.
            unsaid: Settings that the folder lacks.
            framing: How upright frames are transformed; by the folder's settings, or not at all, when omitted.

        Raises:
            CheckpointError: the folder is missing, damaged or of another model.
            RecipeError: `unsaid.options` do not fit together.
        """
        checkpoint = load.locate(str(path))
        config = OpenVLAConfig.from_folder(checkpoint.holding("config.json"), load.FIELD, unsaid.tower_options)
        statistics = Statistics.read(checkpoint.holding(STATISTICS), config.raw.get("norm_stats") or {})
        cfg, sizes = _settings(checkpoint, config, unsaid, statistics)
        state_encoder = read_state_encoder(checkpoint.holding(SETTINGS), cfg, tokenizer, device)
        with load.on_meta():
            network = PolicyNetwork(config, cfg, sizes)
        network = network.to(dtype or getattr(torch, str(config.raw.get("torch_dtype", "float32"))))
        if (seen := framing or recorded_framing(checkpoint.folder)) is None:
            log.warning("%s: does not say how it sees frames, and sees them as they come; `load_policy` takes it", path)
        load.materialise(network, device)
        found, adapter = load.read(checkpoint, network)
        load.WeightLoader(network, found, str(path), adapter=adapter).write(network)
        return cls(
            network.eval(),
            text or TextTokenizer.from_folder(checkpoint.holding(TOKENIZER), config.pad, cfg.prompt),
            ImageProcessor.from_folder(checkpoint.holding(PREPROCESSOR), config),
            statistics,
            state_encoder,
            seen or AS_IT_IS,
        )

    @property
    def cfg(self) -> recipe.PolicyConfig:
        return self.network.cfg

    def act_batch(
        self,
        images: Sequence[Sequence[Picture]],
        instructions: Sequence[str],
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `act`, for B timesteps of one source → (B, C, A); `proprio` is (B, P)."""
        return self.predict(images, instructions, unnorm_key=unnorm_key, proprio=proprio)[0]

    def predict(
        self,
        images: Sequence[Sequence[Picture]],
        instructions: Sequence[str],
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Tensor | None]:
        """As `act_batch`, with the world head's prediction: (B, tokens, dim), None without a head."""
        sizes = self.network.sizes
        prompts = self.text.encode(instructions, blanks=sizes.action_tokens if self.network.parallel else 0)
        return self.predict_encoded(prompts, self._look(images), unnorm_key=unnorm_key, proprio=proprio)

    def predict_encoded(
        self,
        prompts: Encoded,
        images: Tensor | Features,
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Tensor | None]:
        """As `predict`, for encoded prompts and images."""
        cfg, sizes, vla = self.cfg, self.network.sizes, self.network.vla
        actions = self.statistics.range(unnorm_key, "action", cfg.bounds)
        if self.network.parallel and len(actions) != sizes.action_dim:
            raise DataError(f"{unnorm_key}: statistics of {len(actions)} numbers, the policy has {sizes.action_dim}")
        state = encode_proprio(proprio, cfg, self.statistics, unnorm_key, self.device)
        prompts = prompts.to(self.device)
        inputs = Inputs(
            prompts.input_ids, prompts.attention_mask, prompts.prompts, _to(images, self.device), proprio=state
        )
        found = self.network.predict(inputs, None if self.network.parallel else len(actions) * sizes.chunk)
        if found.actions is not None:
            values = found.actions.cpu().numpy()
        else:
            assert found.ids is not None
            coder = ActionTokenizer(vla.config.text_vocabulary, vla.config.bins)
            values = coder.decode(found.ids.cpu().numpy()).reshape(len(found.ids), -1, len(actions))
        return actions.restore(values, epsilon=self.network.parallel), found.world

    def _look(self, images: Sequence[Sequence[Picture]]) -> Tensor | Features:
        if self.vision is not None:
            return encode_views(self.vision, self.cfg, images, self.framing)
        check_views(self.cfg, images)
        return torch.stack([self.processor([self.framing(view) for view in views]) for views in images])


def _to(images: Tensor | Features, device: torch.device) -> Tensor | Features:
    if isinstance(images, Tensor):
        return images.to(device)
    return Features(*(None if part is None else part.to(device) for part in images))


def _settings(
    checkpoint: load.PolicyCheckpoint, config: OpenVLAConfig, unsaid: Unsaid, statistics: Statistics
) -> tuple[recipe.PolicyConfig, PolicySizes]:
    path = checkpoint.holding(SETTINGS) / SETTINGS
    if not path.is_file():
        return _official(checkpoint, config, unsaid, statistics)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {about['format']}, this version reads {FORMAT}; export it again")
        cfg = recipe.OpenVLAPolicyConfig.model_validate({**about["policy"], **unsaid.options})
        sizes = about["sizes"]
        target = tuple(sizes["target"]) if sizes["target"] else None
        return cfg, PolicySizes(**{**sizes, "target": target, "chunk": unsaid.chunk or sizes["chunk"]})
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise unreadable(path, error) from error


def _official(
    checkpoint: load.PolicyCheckpoint, config: OpenVLAConfig, unsaid: Unsaid, statistics: Statistics
) -> tuple[recipe.PolicyConfig, PolicySizes]:
    """The settings that released folders lack, derived from their files."""
    options, chunk = unsaid.options, unsaid.chunk
    head, proprio = checkpoint.part("action_head"), checkpoint.part("proprio_projector")
    found: dict[str, Any] = {
        "actions": "regression" if head else "tokens",
        "proprio": bool(proprio),
        "film": any(load.has_part(folder, "vision_backbone") for folder in (checkpoint.folder, checkpoint.base)),
        "prompt": "v01" if "vicuna" in config.raw.get("llm_backbone_id", "") else "openvla",
    }
    widths = [len(s["action"]["q01"]) for s in statistics.sources.values() if "q01" in s.get("action", {})]
    action_dim = head["model.fc2.bias"].shape[0] if head else max(widths, default=7)
    proprio_dim = proprio["fc1.weight"].shape[1] if proprio else 0
    parallel = {**found, **options}["actions"] != "tokens"
    if parallel:
        platform = _PLATFORMS.get((action_dim, proprio_dim))
        if platform is None and (chunk is None or "views" not in options):
            raise CheckpointError(
                f"{checkpoint.folder}: a policy of {action_dim} numbers and {proprio_dim} of proprioception is none of "
                "OFT's robots; say its chunk, and views and bounds in options"
            )
        if platform is not None:
            chunk, found["views"], found["bounds"] = chunk or platform[0], platform[1], platform[2]
    cfg = recipe.OpenVLAPolicyConfig.model_validate({**found, **options})
    return cfg, PolicySizes(action_dim, chunk or 1, proprio_dim if cfg.proprio else 0)
