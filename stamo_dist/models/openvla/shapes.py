"""A policy's shapes: a training step on the meta device, without memory or data."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from stamo_dist.models.flops import counter, shapes_only
from stamo_dist.models.openvla.adapt import prepare
from stamo_dist.models.openvla.config import OpenVLAConfig
from stamo_dist.models.openvla.load import fresh_parts
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.recipe.policy import PolicyConfig


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens that a policy reads per sample."""

    text: int  # ids of prompt, actions and </s>, with padding
    patches: int = 0  # of the StaMo encoder, all views
    states: int = 0  # state tokens of the StaMo encoder, all views


def on_meta(
    config: OpenVLAConfig,
    cfg: PolicyConfig,
    sizes: PolicySizes,
    *,
    whole: Collection[str] | None = None,
    base: torch.dtype = torch.float32,
) -> PolicyNetwork:
    """The network on the meta device, with the same trained parameters as in the recipe's run.

    `whole` and `base` are those of `adapt.prepare`. Without `whole`, the checkpoint, if `cfg` names one, is assumed to
    lack all optional parts.
    """
    with torch.device("meta"):
        network = PolicyNetwork(config, cfg, sizes)
        if whole is None:
            lacks = re.compile(fresh_parts(cfg))
            whole = {name for name, _ in network.named_parameters() if cfg.weights is not None and lacks.match(name)}
        prepare(network, cfg, whole, base)
    return network


def inputs(network: PolicyNetwork, seen: TokenCounts, batch: int) -> Inputs:
    """A batch with the device and dtype of the network's parameters; every sample has actions and a target."""
    vla, sizes, weight = network.vla, network.sizes, next(network.parameters())
    ids = torch.zeros(batch, seen.text, dtype=torch.int64, device=weight.device)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=weight.dtype, device=weight.device)

    images: Tensor | Features
    if vla.config.towers:
        side = vla.config.towers[0].image_size
        images = numbers(3 * len(vla.config.towers) * network.cfg.views, side, side)
    else:
        images = Features(
            None if sizes.patch_dim is None else numbers(seen.patches, sizes.patch_dim),
            None if sizes.state_dim is None else numbers(seen.states, sizes.state_dim),
        )
    return Inputs(
        ids,
        None,
        torch.zeros(batch, dtype=torch.int64, device=weight.device),
        images,
        ids,
        numbers(sizes.proprio_dim) if sizes.proprio_dim else None,
        numbers(sizes.chunk, sizes.action_dim),
        None,
        numbers(*sizes.target) if sizes.target else None,
        None,
    )


def loss(network: PolicyNetwork, batch: Inputs) -> Tensor:
    """A scalar that depends on all losses of the network."""
    found = network(batch)
    return found.action.sum() + found.mse.sum() + found.l1.sum()


def training_flops(network: PolicyNetwork, seen: TokenCounts) -> int:
    """FLOPs of one sample through a network on the meta device, forward and backward, without recomputation.

    Frozen weights get no gradient, and no gradient is computed before the first trained layer.
    """
    with shapes_only(network), counter() as counted:
        loss(network, inputs(network, seen, 1)).backward()
    return counted.get_total_flops()
