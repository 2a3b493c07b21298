"""Training the diffusion-transformer policy: labelled episodes teach actions, all of them pseudo-actions (STAMO §3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stamo_dist.data.loader import Batch, CachedStates, CacheKeys, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import DataError, RecipeError
from stamo_dist.models.images import to_float
from stamo_dist.models.openvla.stamo import EncodedFrames
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.rdt import (
    ActionPlan,
    Condition,
    DiffusionSizes,
    DiffusionTransformer,
    add_noise,
    motion_shape,
    pixel_grid,
)
from stamo_dist.models.rdt_policy import RDTPolicy
from stamo_dist.recipe.policy import DiffusionPolicyConfig
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import WHOLE, ExportLayout, LossOutput, load_trained
from stamo_dist.tasks.noise import StepNoise
from stamo_dist.tasks.policy_batch import Ranges
from stamo_dist.tasks.policy_data import PolicyData
from stamo_dist.tasks.policy_state_encoder import encode, open_state_encoder, sources_of, target_of

_LEVEL, _ACTIONS, _PSEUDO = 0, 1, 2  # independent noise streams of one sample
_SCALED_ON = 64  # pairs of frames


class DiffusionTask:
    """L = λ_a · MSE(clean chunk) + w · MSE(clean pseudo-actions), the mean over all samples of the batch.

    Both are denoised together, at one noise level a sample. What a sample lacks is masked in the network and in the
    loss: actions, if its episode is a video or not `labelled` or ends within the chunk; the chunk's pseudo-action, if
    the episode ends before the target frame, and with `pseudo_per: step` those beyond the episode's end; both, if it
    replaces an unreadable frame. A sample's loss is the mean over the steps that it has.

    Pseudo-actions are divided by their root mean square over the first pairs of the run's data, which is stored with
    the weights, so that they have the scale of the noise.
    """

    init_frames = 0
    latents: str | None = None

    def __init__(self, recipe: Recipe, mixture: Mixture, policy: DiffusionPolicyConfig):
        window = mixture.window
        assert window is not None, "a policy's recipe has a horizon"
        cfg = policy.diffusion
        self._cfg, self._policy = cfg, policy
        self._data = data = PolicyData(recipe, mixture)
        state_encoder, fingerprint = open_state_encoder(recipe, mixture)
        assert state_encoder is not None, "the recipe's check wants vision: stamo"
        self._state_encoder, self._fingerprint = state_encoder, fingerprint
        self._each = cfg.pseudo == "motion" and cfg.pseudo_per == "step"
        cached = policy.targets == "cached"
        self.states = CachedStates(fingerprint, self._each) if cached and fingerprint else None
        texts = data.instructions.texts
        try:
            self._text = TextTokenizer.from_instructions(texts, size=cfg.vocabulary, bins=0)
        except ValueError as error:
            raise RecipeError([f"policy.diffusion.vocabulary: {error}"]) from None
        prompts = self._text.encode(texts)
        self._prompts = [prompts.input_ids, prompts.attention_mask]
        tokens, dim = state_encoder.state_shape
        self._grid = pixel_grid(tokens, dim)
        self.sizes = DiffusionSizes(
            window.horizon,
            window.action_dim,
            state_encoder.patch_dim if policy.stamo == "patches" else dim,
            cfg.vocabulary + 1,  # and the padding
            motion_shape(cfg.pseudo, cfg.pseudo_per, window.horizon, (tokens, dim)),
            window.proprio_dim if policy.proprio else 0,
        )
        self.network = DiffusionTransformer(cfg, self.sizes)
        self.trained: nn.Module = self.network
        self.sources: Mapping[str, str] = sources_of(state_encoder)
        self.block_classes = self.network.block_classes()
        self.network.set_gradient_checkpointing(recipe.train.recompute)
        if recipe.train.compile:
            for block in self.network.blocks:
                block.forward = torch.compile(block.forward)
        self._actions = Ranges(data.actions, self.sizes.action_dim, constant_is_zero=True)
        self._proprio = Ranges(data.proprio, self.sizes.proprio_dim, constant_is_zero=False) if policy.proprio else None
        self._horizons, self._steps = torch.tensor(window.horizons), torch.arange(window.horizon)
        self.scale = 1.0 if self.sizes.motion is None else self._scale_on(mixture)
        self.terms: tuple[str, ...] = ("loss", "action", *(("pseudo",) if self.sizes.motion else ()))
        pseudo = f"{cfg.pseudo} of each step" if self._each else cfg.pseudo
        self.notes: tuple[str, ...] = (
            f"policy: random initial weights; pseudo-actions: {pseudo}, divided by {self.scale:g}",
            *data.notes,
        )

    @property
    def frozen(self) -> Mapping[str, str]:
        return {"tokenizer": self._fingerprint or "", "pseudo_scale": f"{self.scale:g}"}

    def initialise(self, frames: Tensor) -> None:
        """Does nothing: the scale was measured when the task was built."""

    def load_weights(self) -> None:
        """Does nothing: the model was built with its weights."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self._state_encoder.tokenizer.to(device)
        self._state_encoder.tokenizer.encoder.to(dtype=dtype)
        for table in (self._data.instructions, self._actions, self._proprio):
            if table is not None:
                table.to(device)
        self._horizons, self._steps = self._horizons.to(device), self._steps.to(device)
        self._prompts = [table.to(device) for table in self._prompts]

    def loss(self, module: nn.Module, batch: Batch, noise: StepNoise) -> LossOutput:
        with torch.no_grad():
            known, clean, has_actions, has_motion = self._timestep(batch)
            seeds = ActionPlan(
                noise.normal(batch.sample, clean.actions.shape[1:], _ACTIONS),
                None if clean.motion is None else noise.normal(batch.sample, clean.motion.shape[1:], _PSEUDO),
            )
            noisy, level = add_noise(self._cfg, clean, seeds, noise.uniform(batch.sample, _LEVEL))
        found = module(noisy, level, known, has_actions, has_motion)
        action = _error(found.actions, clean.actions, has_actions)
        loss = self._policy.action_weight * action
        terms, present = {"action": action}, {"action": has_actions}
        if clean.motion is not None:
            pseudo = _error(found.motion, clean.motion, has_motion)
            loss = loss + self._cfg.pseudo_weight * pseudo
            terms["pseudo"], present["pseudo"] = pseudo, has_motion.view(len(batch), -1).any(1)
        return LossOutput(loss.mean(), {"loss": loss, **terms}, present)

    def _timestep(self, batch: Batch) -> tuple[Condition, ActionPlan, Tensor, Tensor]:
        """The condition, the target plan, and masks of actions (b,) and of pseudo-actions, (b,) or (b, C)."""
        assert batch.actions is not None
        assert batch.mask is not None
        assert batch.ahead is not None
        assert batch.replaced is not None
        own, instructions = ~batch.replaced, self._data.instructions
        has_actions = batch.mask.all(1) & self._actions.have(batch.source) & own & instructions.labelled(batch.sample)
        actions = self._actions.normalise(batch.actions, batch.source).float()
        now = encode(batch, self._state_encoder, self._policy.stamo)
        seen = now.features(self._policy.stamo, self._policy.views)
        image = seen.patches if seen.patches is not None else seen.states
        assert image is not None, "one of them is read"
        proprio = None
        if self._proprio is not None:
            assert batch.proprio is not None
            proprio = self._proprio.normalise(batch.proprio, batch.source).float()
        texts = instructions.of(batch.sample)
        known = Condition(image, self._prompts[0][texts], self._prompts[1][texts], proprio)
        motion = (
            None if self.sizes.motion is None else self._pseudo(batch, now.first_view(self._policy.views)) / self.scale
        )
        if self._each:
            has_motion = (self._steps < batch.ahead[:, None]) & own[:, None]
        else:
            has_motion = (batch.ahead == self._horizons[batch.source]) & own
        # Masked values must not be NaN: attention would spread it nevertheless.
        return known, ActionPlan(torch.where(has_actions[:, None, None], actions, 0), motion), has_actions, has_motion

    def _pseudo(self, batch: Batch, now: EncodedFrames | None = None) -> Tensor:
        """(b, *sizes.motion) float32, in the units of states or of pixels from 0 to 1; 0 for missing steps."""
        if self._each:
            assert batch.state is not None, "they come together"
            assert batch.next_states is not None, "the recipe's check wants cached states"
            before = torch.cat([batch.state[:, None], batch.next_states[:, :-1]], dim=1)
            assert batch.ahead is not None, "they come together"
            there = (self._steps < batch.ahead[:, None])[..., None, None]
            return torch.where(there, batch.next_states - before, 0).flatten(2)
        if self._cfg.pseudo == "motion":
            return target_of(batch, self._state_encoder, "motion", now)
        assert batch.target is not None, "the recipe's check wants data.target"
        pooled = [F.adaptive_avg_pool2d(to_float(frames), self._grid) for frames in (batch.target, batch.images)]
        return (pooled[0] - pooled[1]).permute(0, 2, 3, 1).flatten(2)

    @torch.no_grad()
    def _scale_on(self, mixture: Mixture) -> float:
        """Root mean square rounded to two digits, so that processes whose sums differ in the last bit agree.

        Raises:
            DataError: None of the frames looked at has a target, or nothing moves.
        """
        squares: list[Tensor] = []
        loader = build_loader(
            mixture,
            rank=0,
            world_size=1,
            cursor=Cursor(),
            workers=0,
            caches=CacheKeys(states=self.states),
        )
        with closing(loader):
            for _, batch in zip(range(_SCALED_ON), loader, strict=False):
                for part in batch.split(_SCALED_ON // 4):
                    assert part.ahead is not None
                    whole = part.ahead == self._horizons[part.source]
                    squares += self._pseudo(part)[whole].square().mean((1, 2))
                    if len(squares) >= _SCALED_ON:
                        break
                if len(squares) >= _SCALED_ON:
                    break
        scale = float(torch.stack(squares).mean().sqrt()) if squares else 0.0
        if not scale:
            raise DataError("nothing moves between the first frames and their targets; is data.horizon too short?")
        return float(f"{scale:.2g}")

    def flops_per_sample(self) -> float:
        """Two operations per weight and token, three times as many if trained; and the encoder on each frame."""
        encoder = self._state_encoder.tokenizer.encoder
        patches = (encoder.image_size // encoder.model.config.patch_size) ** 2
        online = self._cfg.pseudo == "motion" and self.states is None
        spared = self.states is not None and self._policy.stamo == "states" and self._policy.views == 1
        read = 0 if spared else self._policy.views
        frozen = 2.0 * (read + online) * patches * sum(p.numel() for p in encoder.parameters())
        tokens = self.network.positions.shape[0]
        learnt = 2.0 * tokens * sum(p.numel() for p in self.network.blocks.parameters())
        seen = self._policy.views * (patches if self._policy.stamo == "patches" else self._state_encoder.state_shape[0])
        learnt += 2.0 * seen * sum(p.numel() for p in self.network.image_in.parameters())
        return 3 * learnt + frozen

    def export(
        self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch], layout: ExportLayout = WHOLE
    ) -> None:
        """Write the folder that `load_policy` reads, with the statistics."""
        load_trained(self.network, weights)
        data = self._data
        policy = RDTPolicy(
            self.network, self._policy, self._text, data.statistics, self._state_encoder, self.scale, data.framing
        )
        policy.save_pretrained(folder, layout.dtype)


def _error(found: Tensor, wanted: Tensor, has: Tensor) -> Tensor:
    """(b,) mean squared error over unmasked values, `has` (b,) or (b, tokens); 0 with a zero gradient without any."""
    has = has.view(len(has), -1)
    squares = (found - torch.where(has[:, :, None], wanted, found.detach())).square().mean((1, 2))
    if has.shape[1] == 1:
        return squares
    return squares * (has.shape[1] / has.sum(1).clamp_min(1))
