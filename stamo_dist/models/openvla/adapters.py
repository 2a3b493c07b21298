"""Low-rank adapters in PEFT's format: adapter_config.json beside adapter_model.safetensors, read and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.shards import Slices, StoredTensor
from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.policy import Lora

FIELD = "policy.weights"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # name of a network's only adapter
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(rf"(.+)\.lora_([AB])(?:\.{NAME})?\.weight")
_MERGE = "merge it into its base with peft (merge_and_unload) and give that folder"
_OTHER_KINDS = ("use_dora", "lora_bias", "fan_in_fan_out", "target_parameters", "layer_replication", "megatron_config")


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one layer's weight W: scale · B A."""

    down: StoredTensor  # A: (rank, inputs), or (rank, inputs, height, width) of a convolution
    up: StoredTensor  # B: (outputs, rank), or (outputs, rank, 1, 1)
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it fits."""
        return (self.up.shape[0], *self.down.shape[1:])

    def added_to(self, base: StoredTensor) -> StoredTensor:
        """W + scale · B A in float32."""

        def read(slices: Slices) -> Tensor:
            down, up = (s.read((slice(None),) * len(s.shape)).float().flatten(1) for s in (self.down, self.up))
            delta = (up @ down).view(base.shape) * self.scale
            return base.read(slices).float() + delta[slices]

        return StoredTensor(base.shape, read)

    def goes_on_in(self, layer: nn.Module) -> bool:
        """Whether `layer` has an adapter of the same shape and scale, so that these weights can continue in it."""
        ranks, scales = getattr(layer, "r", {}), getattr(layer, "scaling", {})
        return NAME in ranks and ranks[NAME] == self.rank and math.isclose(scales[NAME], self.scale)


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder, by the names of a network."""

    folder: Path
    layers: Mapping[str, LowRank]  # by layer
    whole: Mapping[str, StoredTensor]  # PEFT's modules_to_save, by parameter: they replace the base's

    def goes_on(self, network: nn.Module) -> list[str]:
        """The layers of a prepared network in which these adapters continue; in the others they are merged."""
        modules = dict(network.named_modules())
        return [name for name, low in self.layers.items() if name in modules and low.goes_on_in(modules[name])]


@dataclass(frozen=True)
class Base:
    """The base of written adapters: its name or path for others, and the network's parameters that it lacks."""

    name: str
    lacks: Collection[str] = ()


def lies_in(folder: Path) -> bool:
    """Whether a folder contains an adapter.

    Raises:
        CheckpointError: a part of it is missing, or it is a pickle.
    """
    config, files = (folder / CONFIG).is_file(), sorted(folder.glob("adapter_model*"))
    if not config and not files:
        return False
    if not config:
        raise CheckpointError(
            f"{FIELD}: {files[0]} has no {CONFIG} beside it, which says its scale; add that, or take the file away"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = f" ({files[0].name} is not read: save it again as safetensors)" if files else ""
        raise CheckpointError(
            f"{FIELD}: {folder} has {CONFIG} and no {WEIGHTS}{pickled}; add it, or take {CONFIG} away"
        )
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        CheckpointError: it cannot be read, or is not plain LoRA.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{FIELD}: {path} cannot be read ({error}); copy it again") from error
    if kind != "LORA":
        raise CheckpointError(f"{FIELD}: {path} says peft_type {kind}, and only LORA is read; {_MERGE}")
    if other := next((name for name in _OTHER_KINDS if config.get(name)), None):
        raise CheckpointError(f"{FIELD}: {path} says {other}, and only plain LoRA is read; {_MERGE}")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{FIELD}: {path} says no lora_alpha, the adapters' scale times rank; copy it again")
    return config


def read(folder: Path, rename: Callable[[str], str]) -> Adapter:
    """The adapter in a folder; `rename` turns the base's names into the network's.

    Raises:
        CheckpointError: a file is damaged, or holds anything but plain LoRA and full parameters.
    """
    config, path = read_config(folder), folder / WEIGHTS
    file = weights.open_file(path, FIELD)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    whole = {}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        tensor, name = StoredTensor.in_file(file, key), key.removeprefix(_PREFIX)
        if low := _LOW_RANK.fullmatch(name):
            pairs.setdefault(low[1], {})[low[2]] = tensor
        elif ".lora_" in name:
            raise CheckpointError(f"{FIELD}: {path} holds {key}, which is no plain LoRA; {_MERGE}")
        else:
            name = re.sub(rf"\.(base_layer|modules_to_save(\.{NAME})?)\.", ".", name)
            whole[rename(name)] = tensor
    layers = {}
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(f"{FIELD}: {path} has no fitting lora_A and lora_B of {name}; copy it again")
        layers[rename(f"{name}.weight").removesuffix(".weight")] = LowRank(
            pair["A"], pair["B"], _scale(config, name, pair["A"].shape[0])
        )
    return Adapter(folder, layers, whole)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    named = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = next(named, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def save(folder: Path, cfg: Lora, state: Mapping[str, Tensor], base: str, rename: Callable[[str], str]) -> None:
    """Write the adapters and full parameters `state`, by the names of a network, for the base named `base`.

    `rename` turns the network's names into the base's.
    """
    from peft import LoraConfig

    tensors = {rename(name).replace(f".{NAME}.weight", ".weight"): tensor for name, tensor in state.items()}
    low = [found[1] for name in tensors if (found := _LOW_RANK.fullmatch(name))]
    whole = {name.rpartition(".")[0] for name in tensors if not _LOW_RANK.fullmatch(name)}
    hub = hub_id(base)
    LoraConfig(
        revision=None if hub is None else hub[1],
        r=cfg.rank,
        lora_alpha=cfg.scale,
        lora_dropout=cfg.dropout,
        target_modules=sorted(set(low)),
        modules_to_save=sorted(whole) or None,
        base_model_name_or_path=base if hub is None else hub[0],
        inference_mode=True,
    ).save_pretrained(str(folder))
    weights.save({f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
