"""Checking by headers alone that a recipe's checkpoints are the ones it needs.

Compares the tensors that distinguish models and sizes; loading compares all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stamo_dist.errors import CheckpointError
from stamo_dist.pretrained.files import Shape
from stamo_dist.pretrained.place import cached, download, has_weights, hub_id, named_base, on_disk
from stamo_dist.pretrained.reading import KINDS, OpenedCheckpoint, differing, look, read_json
from stamo_dist.recipe.policy import PolicyConfig
from stamo_dist.recipe.schema import Model, Recipe

_FIELDS = {"encoder": "model.encoder", "decoder": "model.decoder", "vae": "model.vae", "policy": "policy"}
_EXPORTED = "stamo.json"
_ADAPTER = "adapter_config.json"


@dataclass
class WantedWeights:
    """The results: problems, and hub ids whose files are not local, by recipe field."""

    problems: dict[str, list[str]] = field(default_factory=dict)  # field → problems, each beginning with a field
    absent: dict[str, tuple[str, str]] = field(default_factory=dict)  # field → (hub id, the command that downloads it)


def look_at(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> WantedWeights:
    """Check all weights that the recipe's stage reads, as found by a process with these environment variables."""
    looked, opened = WantedWeights(), dict[str, OpenedCheckpoint]()
    for part, name, weights in wanted(recipe):
        problems = looked.problems.setdefault(name, [])
        try:
            found = _find(part, name, weights, looked, environ)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if found is not None:
            opened[part] = found
            problems += _misfits(part, found, name, weights, recipe)
    tokenizer = hub_id(recipe.policy.tokenizer or "") if recipe.stage == "policy" else None
    if tokenizer is not None and cached(*tokenizer, [""], environ, _EXPORTED) is None:
        looked.absent["policy.tokenizer"] = str(recipe.policy.tokenizer), download(*tokenizer)
    if not any(looked.problems.values()):
        _together(recipe, opened, looked)
    return looked


def wanted(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(part, recipe field, weights) of the checkpoints that the stage reads."""
    parts = {"vae": ("vae",), "policy": ("policy",), "tokenizer": ("encoder", "decoder", "vae")}[recipe.stage]
    for part in parts:
        section = recipe.policy if part == "policy" else getattr(recipe.model, part)
        if section.weights is not None:
            yield part, f"{_FIELDS[part]}.weights", section.weights
    encoder = _state_encoder(recipe) if recipe.stage == "policy" else None
    if encoder is not None and encoder.weights is not None:
        yield "encoder", "policy.tokenizer", encoder.weights


def _state_encoder(recipe: Recipe) -> Any:
    """The frozen encoder that the policy's tokenizer uses but does not contain; None if there is none."""
    root = Path(recipe.policy.tokenizer or "/").expanduser()
    about = next((p / _EXPORTED for p in (root, root / "model") if (p / _EXPORTED).is_file()), None)
    if recipe.policy.tokenizer is None or about is None:
        return None
    try:
        encoder = Model.model_validate(read_json(about, "policy.tokenizer")["model"]).encoder
    except (CheckpointError, KeyError, ValueError):
        return None  # reading the tokenizer reports the problem
    return None if encoder.train else encoder


def _find(
    part: str, name: str, weights: str, looked: WantedWeights, environ: Mapping[str, str]
) -> OpenedCheckpoint | None:
    if part == "policy" and (base := adapter_base(weights, environ)) is not None:
        weights, name = base, f"{name} (base of {weights})"
    hub = hub_id(weights)
    if hub is None:
        return look(on_disk(weights, KINDS[part].subfolders, name), part, name)
    folder = cached(*hub, KINDS[part].subfolders, environ)
    if folder is None or not any(folder.glob("*.safetensors")):
        looked.absent[name] = weights, download(*hub)
        return None
    return look(folder, part, name)


def adapter_base(weights: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The base of a policy's adapter, a path or a hub id; None if `weights` are not an adapter.

    Raises:
        CheckpointError: The adapter is incomplete, or names no base.
    """
    hub = hub_id(weights)
    given = Path(weights).expanduser() if hub is None else cached(*hub, [""], environ, _ADAPTER)
    if given is None or has_weights(given):
        return None
    # OFT's training stores its adapter in a folder of this name.
    adapter = next((p for p in (given, given / "lora_adapter") if (p / _ADAPTER).is_file()), None)
    if adapter is None:
        return None
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"policy.weights: {adapter} has {_ADAPTER} and no adapter_model.safetensors; add it")
    base = named_base(adapter, read_json(adapter / _ADAPTER, "policy.weights"))
    at = hub_id(base)
    if at is not None and cached(*at, [""], environ, _ADAPTER) is not None:
        raise CheckpointError(f"policy.weights: {base} is the base of an adapter and one itself; merge that with peft")
    above = adapter.absolute().parent
    there = at is not None and cached(*at, [""], environ) is not None
    return str(above) if not there and not has_weights(Path(base)) and has_weights(above) else base


def _misfits(part: str, found: OpenedCheckpoint, name: str, weights: str, recipe: Recipe) -> list[str]:
    """Mismatches between headers and config.json, and between config.json and the recipe."""
    if part == "policy":
        return _policy(found, name, weights, recipe.policy)
    try:
        telling = _TELLING[part](found.config)
    except (KeyError, TypeError, IndexError):
        telling = {}  # fields missing in config.json take the class's defaults, which are known only with torch
    problems = []
    for key, shape in telling.items():
        has = found.parts[key].shape if key in found.parts else None
        if has != shape:
            says = f"has no {key}" if has is None else f"has {key} {list(has)}"
            wants = f"asks for {list(shape)}" if shape is not None else "asks for none"
            problems.append(f"{name}: {weights} {says}, its config.json {wants}; download the checkpoint again")
            break  # one is enough: the others mismatch in the same way
    if name != "policy.tokenizer":
        problems += differing(getattr(recipe.model, part).config, found.config, _FIELDS[part], weights)
    return problems


def _encoder(config: Mapping[str, Any]) -> dict[str, Shape | None]:
    width, depth, patch = (config[k] for k in ("hidden_size", "num_hidden_layers", "patch_size"))
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        f"encoder.layer.{depth - 1}.attention.attention.query.weight": (width, width),
        f"encoder.layer.{depth}.attention.attention.query.weight": None,
        "embeddings.position_embeddings": (1, (config["image_size"] // patch) ** 2 + 1, width),
    }


def _decoder(config: Mapping[str, Any]) -> dict[str, Shape | None]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    depth, patch, channels = config["num_layers"], config["patch_size"], config["in_channels"]
    return {
        "pos_embed.proj.weight": (width, channels, patch, patch),
        f"transformer_blocks.{depth - 1}.attn.to_q.weight": (width, width),
        f"transformer_blocks.{depth}.attn.to_q.weight": None,
        "proj_out.weight": ((config.get("out_channels") or channels) * patch**2, width),
    }


def _vae(config: Mapping[str, Any]) -> dict[str, Shape | None]:
    widths, channels = config["block_out_channels"], config["latent_channels"]
    last = len(widths) - 1
    return {
        "encoder.conv_in.weight": (widths[0], config.get("in_channels", 3), 3, 3),
        "encoder.conv_out.weight": (2 * channels, widths[-1], 3, 3),
        f"encoder.down_blocks.{last}.resnets.0.conv1.weight": (widths[last], widths[max(0, last - 1)], 3, 3),
        f"encoder.down_blocks.{last + 1}.resnets.0.conv1.weight": None,
    }


def _policy(found: OpenedCheckpoint, name: str, weights: str, policy: PolicyConfig) -> list[str]:
    """As `_misfits`, for OpenVLA's folder; missing heads and projectors start at random."""
    problems, config = [], found.config
    text = config.get("text_config") or {}
    width, depth = (text.get(key, default) for key, default in _LLAMA.items())
    for key, shape in (
        ("language_model.model.embed_tokens.weight", (text.get("vocab_size", 32000), width)),
        (f"language_model.model.layers.{depth - 1}.self_attn.q_proj.weight", (width, width)),
    ):
        has = found.shapes.get(key)
        if has is not None and has != shape:
            problems.append(
                f"{name}: {weights} has {key} {list(has)}, its config.json asks for {list(shape)}; download the "
                "checkpoint again"
            )
            break
    if policy.vision == "fused" and config.get("timm_model_ids") == []:
        problems.append(
            f"policy.vision: fused, but {weights} has no towers of its own: it sees through a StaMo encoder; set "
            "policy.vision: stamo, or give other policy.weights"
        )
    folders = {file.parent for file in found.files.values()}
    if name == "policy.weights" and not any((folder / "tokenizer.json").is_file() for folder in folders):
        problems.append(f"{name}: {weights} has no tokenizer.json; copy the tokenizer of the checkpoint there")
    problems += differing({k: v for k, v in policy.config.items() if k != "text_config"}, config, "policy", weights)
    return problems + [
        f"policy.config.text_config.{key}: {value}, but {weights} has {text[key]}; name other weights, or leave it out"
        for key, value in (policy.config.get("text_config") or {}).items()
        if value != text.get(key, value)
    ]


#: Defaults of transformers' LlamaConfig for fields missing in config.json, as in openvla-7b's.
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32}
_TELLING = {"encoder": _encoder, "decoder": _decoder, "vae": _vae}


def _together(recipe: Recipe, opened: Mapping[str, OpenedCheckpoint], looked: WantedWeights) -> None:
    """Mismatches with the rest of the recipe, for parts that are otherwise right."""
    if recipe.stage != "tokenizer":
        return
    model, configs = recipe.model, {part: found.config for part, found in opened.items()}
    if encoder := configs.get("encoder"):
        size, patch = model.encoder.image_size, encoder["patch_size"]
        if size % patch:
            name = "model.encoder.image_size"
            looked.problems[name] = [
                f"{name}: {size} is no multiple of the patch size {patch} of {model.encoder.weights}"
            ]
    if (decoder := configs.get("decoder")) and (vae := configs.get("vae")):
        takes, gives = decoder["in_channels"], vae["latent_channels"]
        if takes != gives:
            looked.problems.setdefault("model.vae.weights", []).append(
                f"model.vae.weights: {model.vae.weights} gives latents of {gives} channels, and the decoder "
                f"{model.decoder.weights} takes {takes}; name the VAE that belongs to it"
            )
