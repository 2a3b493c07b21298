"""Training a policy: actions as tokens or numbers, and the next state or motion beside them (STAMO §3)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.data.loader import Batch, CachedStates
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla import load, shapes
from stamo_dist.models.openvla.actions import ActionTokenizer
from stamo_dist.models.openvla.adapt import listing, merge_lora, prepare
from stamo_dist.models.openvla.adapters import Base
from stamo_dist.models.openvla.images import PREPROCESSOR, ImageProcessor
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import PolicyParts, save_parts
from stamo_dist.models.openvla.text import TOKENIZER, TextTokenizer
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import WHOLE, ExportLayout, LossOutput, load_trained
from stamo_dist.tasks.noise import StepNoise
from stamo_dist.tasks.policy_batch import Prompts, Ranges
from stamo_dist.tasks.policy_data import PolicyData, check_state_encoder
from stamo_dist.tasks.policy_state_encoder import encode, open_state_encoder, sources_of, target_of
from stamo_dist.words import counted


class PolicyTask:
    """L = λ_a · L_action + λ_f · (mse · MSE + l1 · L1), the mean over all samples of the batch.

    L_action is the cross-entropy of the action tokens, or OFT's L1 of the chunk. A sample whose source has no actions,
    or whose episode ends within the chunk, has no action loss; one whose target frame is beyond the end of its
    episode has no world loss; one that replaces an unreadable frame has neither. So a source's weight in the
    mixture is also the weight of its losses, on any number of processes.
    """

    init_frames = 0
    latents: str | None = None

    def __init__(self, recipe: Recipe, mixture: Mixture, *, meta_init: bool = False, unfilled: bool = False):
        cfg, window = recipe.policy, mixture.window
        assert window is not None, "a policy's recipe has a horizon"
        self._cfg = cfg
        self._data = data = PolicyData(recipe, mixture)
        self._state_encoder, self._fingerprint = open_state_encoder(recipe, mixture)
        check_state_encoder(data.checkpoint, cfg, self._fingerprint)
        self.states = CachedStates(self._fingerprint) if cfg.targets == "cached" and self._fingerprint else None
        self._text = _text(recipe, data)
        self._processor = (
            ImageProcessor.from_folder(data.checkpoint.holding(PREPROCESSOR), data.config)
            if data.checkpoint and data.config.towers and cfg.vision == "fused"
            else ImageProcessor.from_config(data.config)
        )
        encoder = self._state_encoder
        vision = encoder if cfg.vision == "stamo" else None
        sizes = PolicySizes(
            window.action_dim,
            window.horizon,
            window.proprio_dim if cfg.proprio else 0,
            encoder.target_shape(cfg.world.target) if cfg.world and encoder else None,
            vision.patch_dim if vision and cfg.stamo != "states" else None,
            vision.state_shape[1] if vision and cfg.stamo != "patches" else None,
        )
        self.network, self._weight_loader, notes = _network(recipe, data, sizes, unfilled=unfilled)
        self._unloaded = self._weight_loader is not None
        if not meta_init and self._weight_loader is not None:
            load.materialise(self.network)
            self.load_weights()
        self.trained: nn.Module = self.network
        self.block_classes = self.network.block_classes()
        self.network.set_gradient_checkpointing(recipe.train.recompute)
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
        self.notes = (*notes, *data.notes, f"{counted(len(texts), 'instruction')}, text of {self._prompts.length} ids")
        self.sources: Mapping[str, str] = {
            **({} if data.checkpoint is None else data.checkpoint.sources()),
            **sources_of(self._state_encoder),
        }
        self._sizes = sizes

    @property
    def frozen(self) -> Mapping[str, str]:
        prompts = hashlib.sha256(self._prompts.table.cpu().numpy().tobytes()).hexdigest()
        return {"prompts": prompts} | ({"tokenizer": self._fingerprint} if self._fingerprint else {})

    def initialise(self, frames: Tensor) -> None:
        """Does nothing: the statistics come from the manifests."""

    def load_weights(self) -> None:
        if self._weight_loader is not None and self._unloaded:
            self._weight_loader.write(self.network)
            self._unloaded = False

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._state_encoder is not None:
            self._state_encoder.tokenizer.to(device)
            self._state_encoder.tokenizer.encoder.to(dtype=dtype)
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
        # Tokens would hide a non-finite action: its loss must be non-finite.
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
        now = None  # the frame is encoded once, as the policy's input and as the start of a motion
        if cfg.vision == "stamo":
            assert self._state_encoder is not None
            now = encode(batch, self._state_encoder, cfg.stamo)
        if cfg.world is not None:
            before = None if now is None else now.first_view(cfg.views)
            target = target_of(batch, self._state_encoder, cfg.world.target, before)
            has_target = (batch.ahead == self._horizons[batch.source]) & own
        images: Tensor | Features
        if cfg.vision == "stamo":
            assert now is not None
            images = now.features(cfg.stamo, cfg.views)
        else:
            views = batch.cameras().unbind(1)
            images = torch.cat([self._processor.normalise(view) for view in views], dim=1)
        if self._proprio is not None:
            assert batch.proprio is not None
            proprio = self._proprio.normalise(batch.proprio, batch.source).float()
        return Inputs(
            text.input_ids,
            text.attention_mask,
            text.prompts,
            images,
            text.labels,
            proprio,
            actions.float(),
            has_actions,
            target,
            has_target,
        )

    def flops_per_sample(self) -> float:
        seen = self._seen()
        whole = self._weight_loader.whole if self._weight_loader is not None else ()
        trained = shapes.training_flops(shapes.on_meta(self._data.config, self._cfg, self._sizes, whole=whole), seen)
        return trained + (self._state_encoder.flops(self._frames()) if self._state_encoder is not None else 0)

    def _seen(self) -> shapes.TokenCounts:
        """The numbers of tokens of one sample of this policy."""
        views = self._cfg.views if self._state_encoder is not None else 0
        return shapes.TokenCounts(
            self._prompts.length,
            views * self._state_encoder.target_shape("dinov2")[0] if self._state_encoder is not None else 0,
            views * self._state_encoder.state_shape[0] if self._state_encoder is not None else 0,
        )

    def _frames(self) -> int:
        """Number of frames per sample that the frozen tokenizer encodes."""
        cfg = self._cfg
        online = cfg.world if cfg.targets == "online" else None
        if cfg.vision == "stamo":
            spared = cfg.targets == "cached" and cfg.stamo == "states" and cfg.views == 1
            now = 0 if spared else cfg.views
        else:
            now = int(online is not None and online.target == "motion")
        return now + (online is not None)

    def export(
        self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch], layout: ExportLayout = WHOLE
    ) -> None:
        """Write the folder that `Policy.from_pretrained` and the official code read, with the statistics."""
        load_trained(self.network, weights)
        base = None
        if layout.form == "peft":
            base = self._peft_base()
        else:
            self.network.float()  # merging into a bf16 base would round the adapters
            merge_lora(self.network.vla)
        data = self._data
        parts = PolicyParts(self.network, self._text, self._processor, data.statistics, data.framing, self._fingerprint)
        save_parts(folder, parts, self.network.state_dict(), layout, base=base)

    def _peft_base(self) -> Base:
        checkpoint, weight_loader = self._data.checkpoint, self._weight_loader
        assert checkpoint is not None, "adapters have a base"
        assert weight_loader is not None, "which is filled"
        if checkpoint.adapter == checkpoint.base:
            problem = (
                f"--format peft: the run began from {checkpoint.base}, a base and its adapter in one folder, and its "
                "own would stand on that; give --format hf"
            )
            raise RecipeError([problem])
        if weight_loader.merged(self.network):
            problem = (
                f"--format peft: the run began by merging the adapter {checkpoint.adapter} into its base, which so is "
                "no checkpoint; give --format hf"
            )
            raise RecipeError([problem])
        return Base(checkpoint.name, weight_loader.whole)


def _text(recipe: Recipe, data: PolicyData) -> TextTokenizer:
    config, cfg = data.config, recipe.policy
    if data.checkpoint is not None:
        folder = data.checkpoint.holding(TOKENIZER)
        text = TextTokenizer.from_folder(folder, config.pad, cfg.prompt)
        text.check(config.text_vocabulary, config.text.vocab_size, str(folder))
        return text
    try:
        texts = data.instructions.texts
        return TextTokenizer.from_instructions(texts, size=config.text_vocabulary, bins=config.bins)
    except ValueError as error:
        raise RecipeError([f"policy.config.text_config.vocab_size: {error}"]) from None


def _network(
    recipe: Recipe, data: PolicyData, sizes: PolicySizes, *, unfilled: bool
) -> tuple[PolicyNetwork, load.WeightLoader | None, list[str]]:
    """The network, on the meta device if it is `unfilled` or a checkpoint supplies its weights, and the loader."""
    cfg, checkpoint, weight_loader = recipe.policy, data.checkpoint, None
    with load.on_meta() if checkpoint is not None or unfilled else contextlib.nullcontext():
        network = PolicyNetwork(data.config, cfg, sizes)
        if checkpoint is not None:
            found, adapter = load.read(checkpoint, network)
            weight_loader = load.WeightLoader(
                network, found, str(checkpoint.folder), adapter=adapter, fresh=load.fresh_parts(cfg), seed=recipe.seed
            )
        base = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        layers = prepare(network, cfg, weight_loader.whole if weight_loader is not None else (), base)
    if not any(p.requires_grad for p in network.parameters()):
        raise RecipeError(["policy.freeze: keeps all that there is, and nothing is left to train; set one to false"])
    notes = ["policy: random initial weights"] if weight_loader is None else [f"policy: {weight_loader.report}"]
    notes += checkpoint.notes() if checkpoint is not None else []
    if checkpoint is not None and weight_loader is not None and adapter is not None:
        merged = len(weight_loader.merged(network))
        notes.append(
            f"{adapter.folder}: an adapter on {checkpoint.base}: {len(adapter.whole)} whole parameters, "
            f"{len(adapter.layers)} layers, of which {len(adapter.goes_on(network))} train on and {merged} are merged"
        )
    if cfg.lora is not None:
        notes.append(f"policy.lora: rank {cfg.lora.rank} on {len(layers)} layers, the base in {recipe.train.precision}")
    return network, weight_loader, [*notes, *(f"  {line}" for line in listing(network))]
