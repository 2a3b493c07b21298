"""The shapes of a recipe's step: trained and frozen modules on the meta device, and a function that runs the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import Dinov2Config

from stamo_dist.data.instructions import Instructions, episode_tables
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import StamoError
from stamo_dist.models import rdt
from stamo_dist.models.exported import exported
from stamo_dist.models.openvla import shapes as policies
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.policy_network import PolicySizes
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.rdt import DiffusionTransformer, motion_shape
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.models.vae import VAE
from stamo_dist.plan.registry import PAPER, config_of
from stamo_dist.recipe import schema
from stamo_dist.recipe.policy import DiffusionTransformerConfig

_ACTION, _PROPRIO, _TEXT = 7, 8, 64  # LIBERO's dimensions, and the ids of a long instruction


@dataclass
class Shapes:
    """Modules on the meta device, which run inside `flops.shapes_only`."""

    trained: nn.Module
    frozen: list[nn.Module]  # whole on every device, cast to bf16 where the recipe trains in bf16
    step: Callable[[int], Tensor]  # micro-batch → loss
    blocks: tuple[str, ...]
    parts: Mapping[str, Sequence[nn.Module]]  # what a person tells apart → the modules that are called for it
    notes: list[str] = field(default_factory=list)  # what had to be assumed


def shapes(recipe: schema.Recipe) -> Shapes:
    """The shapes of a recipe's step; released weights need not be local.

    Raises:
        RecipeError: The size of a checkpoint is unknown.
    """
    if recipe.stage == "vae":
        return _vae(recipe)
    return _policy(recipe) if recipe.stage == "policy" else _tokenizer(recipe)


def _vae(recipe: schema.Recipe) -> Shapes:
    with torch.device("meta"):
        vae = VAE.from_config(recipe.model.vae, recipe.data.image_size)

    def step(batch: int) -> Tensor:
        image, mean, logvar = vae(_pixels(batch, vae.image_size), torch.empty(batch, *vae.latent_shape))
        return image.sum() + mean.sum() + logvar.sum()

    blocks = ("UNetMidBlock2D", "DownEncoderBlock2D", "UpDecoderBlock2D")
    return Shapes(vae, [], step, blocks, {"VAE": [vae.model.encoder, vae.model.decoder]})


def _tokenizer(recipe: schema.Recipe) -> Shapes:
    notes: list[str] = []
    tokenizer = tokenizer_on_meta(recipe.model, recipe.flow, recipe.data.image_size, notes)
    core, joint = tokenizer.trained, recipe.model.encoder.train
    core.set_gradient_checkpointing(recipe.train.recompute)
    cached = recipe.data.latents == "cached"
    core.train()

    def step(batch: int) -> Tensor:
        frames = torch.empty(batch, *_frame(recipe), dtype=torch.uint8)
        with torch.no_grad():
            z0 = torch.empty(batch, *tokenizer.latent_shape) if cached else tokenizer.latents(frames)
            sigma, epsilon = torch.empty(batch), torch.empty_like(z0)
            z = sigma.view(-1, 1, 1, 1) * (epsilon - z0) + z0
            seen = frames if joint else tokenizer.features(frames)
        velocity, straight = core(seen, z, sigma)
        loss = (velocity.float() - (epsilon - z0)).square().mean()
        return loss if straight is None else loss + (straight - z0).square().mean()

    frozen: list[nn.Module] = [m for m in (tokenizer.vae, tokenizer.frozen_encoder) if m is not None]
    parts = {
        "VAE": [tokenizer.vae.model.encoder],
        "encoder": [tokenizer.encoder],
        "compressor": [core.compressor],
        "DiT": [core.decoder],
    }
    return Shapes(core, frozen, step, core.block_classes(), parts, notes)


def tokenizer_on_meta(model: schema.Model, flow: schema.Flow, image_size: int, notes: list[str]) -> Tokenizer:
    """A recipe's tokenizer on the meta device."""
    parts: dict[str, Any] = {}
    keys = {
        "encoder": [*Dinov2Config().to_dict(), "num_register_tokens"],
        "decoder": inspect.signature(diffusers.SD3Transformer2DModel.__init__).parameters,
        "vae": inspect.signature(diffusers.AutoencoderKL.__init__).parameters,
    }
    derived = {"joint_attention_dim", "pooled_projection_dim"}
    for name, known in keys.items():
        part = getattr(model, name)
        if part.weights is not None:
            try:
                config = config_of(name, part.weights, f"model.{name}.weights")
            except StamoError:
                if name != "vae" or Path(part.weights).exists():
                    raise
                config = PAPER["vae"]
                notes.append(f"model.vae.weights: {part.weights} is not there; Stable Diffusion 3's VAE is assumed")
            config = {k: v for k, v in config.items() if k in known and k not in derived}
            part = part.model_copy(update={"weights": None, "config": config})
        parts[name] = part
    with torch.device("meta"):
        return Tokenizer.from_config(model.model_copy(update=parts), flow, image_size)


def _policy(recipe: schema.Recipe) -> Shapes:
    cfg, notes = recipe.policy, list[str]()
    raw: dict[str, Any] = OPENVLA_7B
    if cfg.weights is not None:
        raw = config_of("policy", cfg.weights, "policy.weights")
    else:
        raw = {**raw, **cfg.config, "text_config": {**raw["text_config"], **cfg.config.get("text_config", {})}}
    config = OpenVLAConfig.from_dict(raw, "policy.config", cfg.config.get("timm_kwargs") or ()).with_vision(cfg.vision)
    tokenizer = policy_tokenizer(recipe, notes)
    action, proprio, text = _data(recipe, config, notes)
    if cfg.diffusion is not None:
        assert tokenizer is not None, "the recipe's check wants vision: stamo"
        return _diffusion(recipe, cfg.diffusion, tokenizer, (action, proprio if cfg.proprio else 0, text), notes)
    patches = states = 0
    target: tuple[int, int] | None = None
    if tokenizer is not None:
        encoder, compressor = tokenizer.encoder, tokenizer.trained.compressor
        grid = (encoder.image_size // encoder.model.config.patch_size) ** 2
        patches, states = cfg.views * grid, cfg.views * compressor.tokens
        if cfg.world is not None:
            raw_target = cfg.world.target == "dinov2"
            target = (grid, encoder.dim) if raw_target else (compressor.tokens, compressor.dim)
    sees = cfg.vision == "stamo" and tokenizer is not None
    patch_dim = encoder.dim if sees and cfg.stamo != "states" else None
    state_dim = compressor.dim if sees and cfg.stamo != "patches" else None
    proprio = proprio if cfg.proprio else 0
    sizes = PolicySizes(action, recipe.data.horizon, proprio, target, patch_dim, state_dim)
    base = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    network = policies.on_meta(config, cfg, sizes, base=base)
    network.set_gradient_checkpointing(recipe.train.recompute)
    network.train()
    seen = policies.TokenCounts(text + sizes.action_tokens + 1, patches, states)

    def step(batch: int) -> Tensor:
        if tokenizer is not None:
            with torch.no_grad():
                for _ in range(1 + (cfg.world is not None)):
                    tokenizer.encode(torch.empty(batch, *_frame(recipe), dtype=torch.uint8))
        return policies.loss(network, policies.inputs(network, seen, batch))

    frozen: list[nn.Module] = [] if tokenizer is None else [tokenizer.encoder, tokenizer.trained.compressor]
    vla, llama = network.vla, network.vla.language_model.model  # whose own forward is not called
    language = [llama.rotary_emb, *llama.layers, llama.norm, vla.language_model.lm_head]
    parts: dict[str, list[nn.Module]] = {"LLM": language}
    parts |= {"encoder": frozen} if frozen else {}
    parts |= {"vision towers": [vla.vision_backbone]} if config.towers else {}
    return Shapes(network, frozen, step, network.block_classes(), parts, notes)


def _diffusion(
    recipe: schema.Recipe,
    cfg: DiffusionTransformerConfig,
    tokenizer: Tokenizer,
    data: tuple[int, int, int],
    notes: list[str],
) -> Shapes:
    policy, compressor = recipe.policy, tokenizer.trained.compressor
    action, proprio, text = data
    whole = policy.stamo == "patches"
    patches = (tokenizer.encoder.image_size // tokenizer.encoder.model.config.patch_size) ** 2
    tokens = policy.views * (patches if whole else compressor.tokens)
    motion = motion_shape(cfg.pseudo, cfg.pseudo_per, recipe.data.horizon, (compressor.tokens, compressor.dim))
    dim = tokenizer.encoder.dim if whole else compressor.dim
    with torch.device("meta"):
        network = DiffusionTransformer(
            cfg, rdt.DiffusionSizes(recipe.data.horizon, action, dim, cfg.vocabulary + 1, motion, proprio)
        )
    network.set_gradient_checkpointing(recipe.train.recompute)
    network.train()
    looks = policy.views + (cfg.pseudo == "motion" and policy.targets == "online")

    def step(batch: int) -> Tensor:
        with torch.no_grad():
            for _ in range(looks):
                tokenizer.encode(torch.empty(batch, *_frame(recipe), dtype=torch.uint8))
        ids = torch.zeros(batch, text, dtype=torch.int64)
        known = rdt.Condition(
            torch.empty(batch, tokens, dim), ids, ids > 0, torch.empty(batch, proprio) if proprio else None
        )
        noisy = rdt.ActionPlan(
            torch.empty(batch, recipe.data.horizon, action), torch.empty(batch, *motion) if motion else None
        )
        has = torch.ones(batch, dtype=torch.bool)
        found = network(noisy, torch.zeros(batch), known, has, has)
        return sum((part.sum() for part in found if part is not None), torch.zeros(()))

    frozen = [tokenizer.encoder, compressor]
    return Shapes(network, frozen, step, network.block_classes(), {"encoder": frozen, "DiT": [network]}, notes)


def policy_tokenizer(recipe: schema.Recipe, notes: list[str]) -> Tokenizer | None:
    """A policy's tokenizer on the meta device; assumptions are added to `notes`."""
    cfg = recipe.policy
    if cfg.tokenizer is None or (cfg.world is None and cfg.vision != "stamo"):
        return None
    try:
        about = exported(cfg.tokenizer)[1]
        model, flow = schema.Model.model_validate(about["model"]), schema.Flow.model_validate(about["flow"])
        size = about["image_size"]
    except StamoError:
        notes.append(f"policy.tokenizer: {cfg.tokenizer} is not there; the paper's is assumed (DINOv2-L, 2 × 1024)")
        parts: dict[str, Any] = {
            "encoder": schema.EncoderConfig(config=PAPER["encoder"], train=True),
            "decoder": schema.DecoderConfig(config=PAPER["decoder"]),
            "vae": schema.VAEConfig(config=PAPER["vae"]),
        }
        model, flow, size = schema.Model(**parts), schema.Flow(), 256
    return tokenizer_on_meta(model, flow, size, notes).requires_grad_(False)


def _data(recipe: schema.Recipe, config: OpenVLAConfig, notes: list[str]) -> tuple[int, int, int]:
    """Dimensions of action and proprioception, and number of ids of the longest prompt."""
    action, proprio, text, missing = _ACTION, _PROPRIO, _TEXT, list[str]()
    try:
        mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
        assert mixture.window is not None, "a policy's recipe has a horizon"
        action, proprio = mixture.window.action_dim or action, mixture.window.proprio_dim or proprio
        try:
            text = _longest(recipe, config, Instructions(mixture, episode_tables(mixture)).texts)
        except (StamoError, ValueError):
            missing = [f"texts of {text} ids"]
    except StamoError:
        missing = [f"actions of {action} numbers", f"{proprio} of proprioception", f"texts of {text} ids"]
    if missing:
        notes.append(f"data.sources or policy.weights are not there: {', '.join(missing)}")
    return action, proprio, text


def _longest(recipe: schema.Recipe, config: OpenVLAConfig, texts: Sequence[str]) -> int:
    cfg = recipe.policy
    if cfg.weights is not None:
        tokenizer = TextTokenizer.from_folder(Path(cfg.weights).expanduser(), config.pad, cfg.prompt)
    else:
        tokenizer = TextTokenizer.from_instructions(texts, size=config.text_vocabulary, bins=config.bins)
    return max(len(tokenizer.prompt_ids(text)) for text in texts)


def _frame(recipe: schema.Recipe) -> tuple[int, int, int]:
    return recipe.data.image_size, recipe.data.image_size, 3


def _pixels(batch: int, size: int) -> Tensor:
    return torch.empty(batch, 3, size, size)
