"""A trained diffusion-transformer policy for use: images and an instruction in, actions in the robot's units out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.openvla.actions import SETTINGS, STATISTICS, Statistics
from stamo_dist.models.openvla.framing import AS_IT_IS, Framing, Picture
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.policy_base import (
    FORMAT,
    TrainedPolicy,
    encode_proprio,
    encode_views,
    folder_settings,
    read_state_encoder,
    recorded_framing,
    unreadable,
)
from stamo_dist.models.rdt import ActionPlan, Condition, DiffusionSizes, DiffusionTransformer, draw
from stamo_dist.recipe import policy as recipe

KIND = "diffusion"
_WEIGHTS = "model.safetensors"


@dataclasses.dataclass
class RDTPolicy(TrainedPolicy):
    """A network with all it needs to be used; `from_pretrained` builds it, `act` and `act_batch` are as `Policy`'s."""

    network: DiffusionTransformer
    cfg: recipe.DiffusionPolicyConfig
    text: TextTokenizer
    statistics: Statistics
    vision: StamoVision
    scale: float  # of the pseudo-actions
    framing: Framing = AS_IT_IS  # how upright frames are transformed

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        tokenizer: str | Path | None = None,
        framing: Framing | None = None,
    ) -> RDTPolicy:
        """Read a run's `model/`; `tokenizer` is where the StaMo tokenizer lies on this machine.

        `framing`: how upright frames are transformed; by the folder's settings when omitted.

        Raises:
            CheckpointError: the folder is missing or damaged, or the tokenizer is another one.
        """
        folder = Path(path)
        settings = folder / SETTINGS
        try:
            about = json.loads(settings.read_text(encoding="utf-8"))
            if about["format"] != FORMAT or about["kind"] != KIND:
                raise CheckpointError(f"{settings}: is not a diffusion policy of format {FORMAT}; export it again")
            cfg, sizes = recipe.DiffusionPolicyConfig.model_validate(about["policy"]), about["sizes"]
            motion = tuple(sizes["motion"]) if sizes["motion"] else None
            network = DiffusionTransformer(cfg.diffusion, DiffusionSizes(**{**sizes, "motion": motion}))
            network.load_state_dict(load_file(folder / _WEIGHTS))
            statistics = Statistics.read(folder, {})
            text = TextTokenizer.from_folder(folder, about["pad"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ValidationError, SafetensorError) as error:
            raise unreadable(folder, error) from error
        seen = framing or recorded_framing(folder) or AS_IT_IS
        state_encoder = read_state_encoder(folder, cfg, tokenizer, device)
        assert state_encoder is not None, "it sees through the tokenizer"
        return cls(network.to(device).eval(), cfg, text, statistics, state_encoder, about["scale"], seen)

    @torch.no_grad()
    def act_batch(
        self,
        images: Sequence[Sequence[Picture]],
        instructions: Sequence[str],
        *,
        unnorm_key: str | None = None,
        proprio: np.ndarray | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """As `act`, for B timesteps of one source → (B, C, A). Each starts from the same noise, that of `seed`."""
        sizes = self.network.sizes
        actions = self.statistics.range(unnorm_key, "action", self.cfg.bounds)
        state = encode_proprio(proprio, self.cfg, self.statistics, unnorm_key, self.device)
        seen = encode_views(self.vision, self.cfg, images, self.framing)
        image = seen.patches if seen.patches is not None else seen.states
        assert image is not None, "one of them is read"
        prompts = self.text.encode(instructions).to(self.device)
        known = Condition(image.to(self.device), prompts.input_ids, prompts.attention_mask, state)
        generator = torch.Generator().manual_seed(seed)
        shapes = [(sizes.chunk, sizes.action_dim), sizes.motion]
        start = [
            None if s is None else torch.randn(1, *s, generator=generator).to(self.device).repeat(len(images), 1, 1)
            for s in shapes
        ]
        assert start[0] is not None, "there are always actions"
        plan = draw(self.network, known, ActionPlan(start[0], start[1]))
        return actions.restore(plan.actions.double().clamp(-1, 1).cpu().numpy(), epsilon=True)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what `from_pretrained` reads, the weights cast to `dtype`; `policy.json` comes last."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).unlink(missing_ok=True)
        weights.save(self.network.state_dict(), folder / _WEIGHTS, dtype)
        self.text.save(folder)
        (folder / STATISTICS).write_text(json.dumps(self.statistics.sources, indent=2) + "\n", encoding="utf-8")
        fingerprint = self.vision.tokenizer.fingerprint
        about = {
            **folder_settings(self.cfg, self.network.sizes, self.statistics, self.framing, fingerprint),
            "kind": KIND,
            "pad": self.text.pad,
            "scale": self.scale,
        }
        (folder / SETTINGS).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
