"""Training a policy: actions as tokens or numbers, and the next state or motion beside them (STAMO §3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.data.loader import Batch
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla import load
from stamo_dist.models.openvla.actions import ActionTokenizer
from stamo_dist.models.openvla.adapt import add_lora, freeze, merge_lora
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, Sizes
from stamo_dist.models.openvla.save import save_parts
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import LossOutput, load_trained
from stamo_dist.tasks.noise import StepNoise
from stamo_dist.tasks.policy_batch import Prompts, Ranges
from stamo_dist.tasks.policy_data import PolicyData
from stamo_dist.tasks.policy_eyes import open_eyes, seen_in, target_of


class PolicyTask:
    """L = λ_a · L_action + λ_f · (mse · MSE + l1 · L1), the mean over all samples of the batch.

    L_action is the cross-entropy of the action tokens, or OFT's L1 of the chunk. A sample whose source has no actions,
    or whose episode ends within the chunk, has no action loss; one whose target frame lies behind the end of its
    episode has no world loss; one that stands in for an unreadable frame has neither. So a source's weight in the
    mixture is also the weight of its losses, on any number of processes.
    """

    init_frames = 0
    latents: str | None = None

    def __init__(self, recipe: Recipe, mixture: Mixture):
        cfg, window = recipe.policy, mixture.window
        assert window is not None, "a policy's recipe has a horizon"
        self._cfg = cfg
        self._data = data = PolicyData(recipe, mixture)
        self._eyes, self._fingerprint = open_eyes(recipe, mixture)
        self.states = self._fingerprint if cfg.targets == "cached" else None
        self._text = _text(recipe, data)
        self._processor = (
            ImageProcessor.from_folder(data.folder, data.config)
            if data.folder and data.config.towers and cfg.vision == "fused"
            else ImageProcessor.from_config(data.config)
        )
        sizes = Sizes(
            window.action_dim,
            window.horizon,
            window.proprio_dim if cfg.proprio else 0,
            self._eyes.target_shape(cfg.world.target) if cfg.world and self._eyes else None,
            self._eyes.patch_dim if cfg.vision == "stamo" and cfg.stamo != "states" and self._eyes else None,
            self._eyes.state_shape[1] if cfg.vision == "stamo" and cfg.stamo != "patches" and self._eyes else None,
        )
        self.network, notes = _network(recipe, data, sizes)
        self.trained: nn.Module = self.network
        self.block_classes = self.network.block_classes()
        if recipe.train.gradient_checkpointing:
            self.network.set_gradient_checkpointing(True)
        if recipe.train.compile:
            for module in self.network.modules():
                if type(module).__name__ in self.block_classes:
                    module.forward = torch.compile(module.forward)
        coder = ActionTokenizer(data.config.text_vocabulary, data.config.bins)
        texts = data.instructions.texts
        self._prompts = Prompts(self._text, texts, coder, sizes.action_tokens, self.network.parallel)
        self._actions = Ranges(data.actions, sizes.action_dim, constant_is_zero=True)
        self._proprio = Ranges(data.proprio, sizes.proprio_dim, constant_is_zero=False) if cfg.proprio else None
        self._horizons = torch.tensor(window.horizons)
        self.terms: tuple[str, ...] = ("loss", "action", *(("world_mse", "world_l1") if cfg.world else ()))
        self.notes = (*notes, f"{len(texts)} instructions, text of {self._prompts.length} ids")
        self._flops = _flops(self.network, self._prompts.length, recipe, self._eyes)

    @property
    def frozen(self) -> Mapping[str, str]:
        prompts = hashlib.sha256(self._prompts.table.cpu().numpy().tobytes()).hexdigest()
        return {"prompts": prompts} | ({"tokenizer": self._fingerprint} if self._fingerprint else {})

    def initialise(self, frames: Tensor) -> None:
        """Nothing here depends on data but the statistics, which the manifests hold."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._eyes is not None:
            self._eyes.tokenizer.to(device)
            self._eyes.tokenizer.encoder.to(dtype=dtype)
        for table in (self._data.instructions, self._prompts, self._actions, self._proprio):
            if table is not None:
                table.to(device)
        self._horizons = self._horizons.to(device)

    def loss(self, module: nn.Module, batch: Batch, noise: StepNoise) -> LossOutput:
        inputs = self._inputs(batch)
        found = module(inputs)
        has_actions, has_target = inputs.has_actions, inputs.has_target
        assert inputs.actions is not None
        assert has_actions is not None
        # A token hides an action that is not finite: its loss must not.
        wrong = 0 * torch.where(has_actions, inputs.actions.sum((1, 2)), 0)
        action = found.action / found.action_count.clamp_min(1) + wrong
        loss = self._cfg.action_weight * action
        terms, present = {"action": action}, {"action": has_actions}
        if world := self._cfg.world:
            assert has_target is not None
            loss = loss + world.weight * (world.mse * found.mse + world.l1 * found.l1)
            terms |= {"world_mse": found.mse, "world_l1": found.l1}
            present |= {"world_mse": has_target, "world_l1": has_target}
        return LossOutput(loss.mean(), {"loss": loss, **terms}, present)

    @torch.no_grad()
    def _inputs(self, batch: Batch) -> Inputs:
        assert batch.actions is not None
        assert batch.mask is not None
        assert batch.ahead is not None
        assert batch.replaced is not None
        cfg, own = self._cfg, ~batch.replaced
        has_actions = batch.mask.all(1) & self._actions.have(batch.source) & own
        has_actions &= self._data.instructions.labelled(batch.sample)
        actions = self._actions.normalise(batch.actions, batch.source)
        text = self._prompts.rows(self._data.instructions.of(batch.sample), actions, has_actions)
        target = has_target = proprio = None
        images: Tensor | Features
        if cfg.world is not None:
            target = target_of(batch, self._eyes, cfg.world.target)
            has_target = (batch.ahead == self._horizons[batch.source]) & own
        if cfg.vision == "stamo":
            assert self._eyes is not None
            images = seen_in(batch, self._eyes, cfg.stamo)
        else:
            views = batch.cameras().unbind(1)
            images = torch.cat([self._processor.normalise(view) for view in views], dim=1)
        if self._proprio is not None:
            assert batch.proprio is not None
            proprio = self._proprio.normalise(batch.proprio, batch.source).float()
        return Inputs(
            text.input_ids, text.attention_mask, text.prompts, images, text.labels, proprio, actions.float(),
            has_actions, target, has_target,
        )  # fmt: skip

    def flops_per_sample(self) -> float:
        return self._flops

    def export(self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch]) -> None:
        """Write the folder that `Policy.from_pretrained` and the official code read, with the statistics."""
        load_trained(self.network, weights)
        merge_lora(self.network.vla)
        save_parts(
            folder, self.network, self.network.state_dict(), self._text, self._processor, self._data.statistics,
            tokenizer_fingerprint=self._fingerprint,
        )  # fmt: skip


def _text(recipe: Recipe, data: PolicyData) -> TextTokenizer:
    config, cfg = data.config, recipe.policy
    if data.folder is not None:
        return TextTokenizer.from_folder(data.folder, config.pad, cfg.prompt)
    try:
        texts = data.instructions.texts
        return TextTokenizer.from_instructions(texts, size=config.text_vocabulary, bins=config.bins)
    except ValueError as error:
        raise RecipeError([f"policy.config.text_config.vocab_size: {error}"]) from None


def _network(recipe: Recipe, data: PolicyData, sizes: Sizes) -> tuple[PolicyNetwork, list[str]]:
    cfg = recipe.policy
    if data.folder is None:
        network = PolicyNetwork(data.config, cfg, sizes)
        notes = ["policy: random initial weights"]
    else:
        with load.on_meta():
            network = PolicyNetwork(data.config, cfg, sizes)
    freeze(network.vla, cfg.freeze)
    if cfg.lora is not None:
        layers = add_lora(network.vla, cfg.lora)
    if data.folder is not None:
        load.materialise(network)
        fresh = load.fresh_parts(cfg)
        report = load.fill(network, load.stored(data.folder, network), str(data.folder), fresh=fresh, seed=recipe.seed)
        notes = [f"policy: {report}"]
    if cfg.lora is not None:
        notes.append(f"policy.lora: rank {cfg.lora.rank} on {len(layers)} layers")
    return network, notes


def _flops(network: PolicyNetwork, text: int, recipe: Recipe, eyes: StamoVision | None) -> float:
    """Arithmetic of one sample: two operations a weight and token, and attention's products; 3 × where it learns."""
    vla, config = network.vla, network.vla.config
    total = 0.0
    if eyes is not None:
        encoder = eyes.tokenizer.encoder
        patches = (encoder.image_size // encoder.model.config.patch_size) ** 2
        cfg = recipe.policy
        spared = cfg.targets == "cached" and cfg.stamo == "states" and cfg.views == 1
        frames = cfg.views if cfg.vision == "stamo" and not spared else 0
        if cfg.world and cfg.targets == "online":
            frames += 2 if cfg.world.target == "motion" else 1
        total += 2.0 * frames * patches * sum(p.numel() for p in encoder.parameters())
    seen = 0
    if config.towers:
        seen = recipe.policy.views * vla.vision_backbone.patches
        learns = 1 if recipe.policy.freeze.vision else 3
        total += 2.0 * learns * seen * sum(p.numel() for p in vla.vision_backbone.parameters())
    elif eyes is not None:
        reads = recipe.policy.stamo
        seen = (patches if reads != "states" else 0) + (eyes.state_shape[0] if reads != "patches" else 0)
        seen *= recipe.policy.views
    length = seen + text + recipe.policy.proprio
    llama = vla.language_model.model
    weights = sum(p.numel() for p in llama.layers.parameters())
    attention = (
        4.0 * len(llama.layers) * length * config.hidden
    )  # of one token: 2 · T · H for scores, as many for values
    return total + 3 * length * (2.0 * weights + attention)
