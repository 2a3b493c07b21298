"""Comparing a checkpoint with a policy network and copying it into the network, each process its own shards."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla.adapters import FIELD, Adapter
from stamo_dist.models.openvla.policy_network import PolicyNetwork
from stamo_dist.models.shards import StoredTensor, write
from stamo_dist.models.weights import LoadReport
from stamo_dist.shares import shape_of

log = logging.getLogger(__name__)

NOTHING = r"(?!)"


class WeightLoader:
    """Compares a checkpoint with a network, then copies it into the parameters, each process its own shards.

    Layers whose names match the pattern `fresh` are initialised (identically on any number of processes) if the
    checkpoint lacks them or has another shape. The network's adapters start as the identity, or continue the
    checkpoint's; other adapters are merged. Towers of the checkpoint that this network does not use are not read.

    Attributes:
        report: The outcome for each parameter, by its name without adapters.
        whole: Parameters that start at random or are full in the checkpoint's adapter; they get no adapters.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        found: Mapping[str, StoredTensor],
        source: str,
        *,
        adapter: Adapter | None = None,
        fresh: str = NOTHING,
        seed: int = 0,
    ):
        """Only names and shapes are compared; the network may be on the meta device.

        Raises:
            CheckpointError: anything else is missing, unknown or has another shape; all of it is listed.
        """
        state = _unadapted(network)
        shapes = {n: (found[n].shape, tuple(t.shape)) for n, t in state.items() if n in found}
        differing = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
        absent = [n for n in state if n not in found]
        self._layers = {n.rpartition(".")[0] for n in (*absent, *differing) if re.match(fresh, n)}
        redone = [n for n in state if n.rpartition(".")[0] in self._layers]
        low = {} if adapter is None else {f"{layer}.weight": low for layer, low in adapter.layers.items()}
        unfit = {
            n: (a.shape, tuple(state[n].shape)) for n, a in low.items() if n in state and a.shape != state[n].shape
        }
        known = {*state, *_unused(network, {**found, **low})}
        self.report = LoadReport(
            source=source,
            loaded=tuple(n for n in shapes if n not in differing and n not in redone),
            reinitialised={n: differing.get(n, ((), tuple(state[n].shape))) for n in redone},
            mismatched={n: pair for n, pair in {**differing, **unfit}.items() if n not in redone},
            missing=tuple(n for n in absent if n not in redone),
            unexpected=tuple(sorted({*found, *low} - known)),
        )
        if not self.report.fits:
            raise CheckpointError(f"{FIELD}: the checkpoint does not fit the policy\n{self.report}")
        if redone:
            log.warning("%s: %s", FIELD, self.report)
        self.whole = {*redone, *(() if adapter is None else adapter.whole)}
        self._found, self._low, self._seed = found, low, seed

    def merged(self, network: PolicyNetwork) -> list[str]:
        """Parameters into which an adapter of the checkpoint is merged, because it does not continue in `network`."""
        return [n for n in self.report.loaded if n in self._low and not self._goes_on(network, n)]

    def _goes_on(self, network: PolicyNetwork, name: str) -> bool:
        return name in self._low and self._low[name].goes_on_in(network.get_submodule(name.removesuffix(".weight")))

    @torch.no_grad()
    def write(self, network: PolicyNetwork) -> LoadReport:
        """Fill the network, with or without adapters, sharded or not; its parameters must have memory."""
        state, merged = _unadapted(network), set(self.merged(network))
        for name in self.report.loaded:
            tensor = self._found[name]
            write(state[name], (self._low[name].added_to(tensor) if name in merged else tensor).read)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            for layer in sorted(self._layers):
                _reset(network.get_submodule(layer))
            for name, tensor in network.state_dict(keep_vars=True).items():
                layer, _, matrix = name.partition(".lora_")
                if not matrix:
                    continue
                if self._goes_on(network, f"{layer}.weight"):
                    low = self._low[f"{layer}.weight"]
                    write(tensor, (low.up if matrix.startswith("B") else low.down).read)
                else:
                    start = torch.zeros(shape_of(tensor))
                    # Peft's gaussian start.
                    drawn = start if matrix.startswith("B") else start.normal_(std=1 / len(start))
                    write(tensor, drawn.__getitem__)
        return self.report


def _unadapted(network: PolicyNetwork) -> dict[str, Tensor]:
    """The network's tensors but its adapters', by the names that they have without them."""
    state = network.state_dict(keep_vars=True)
    return {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}


def _unused(network: PolicyNetwork, found: Iterable[str]) -> set[str]:
    """Towers that the network lacks: it uses one of two, or a StaMo encoder instead."""
    prefixes = []
    if not network.vla.config.towers:
        prefixes.append("vla.vision_backbone.")
    elif network.vla.vision_backbone.fused_featurizer is None:
        prefixes.append("vla.vision_backbone.fused_featurizer.")
    if not hasattr(network.vla, "projector"):
        prefixes.append("vla.projector.")
    elif network.vla.projector.fc3 is None:
        prefixes.append("vla.projector.fc3.")
    return {name for name in found if name.startswith(tuple(prefixes))} if prefixes else set()


def _reset(layer: nn.Module) -> None:
    """Draw a layer's full initial values on the CPU, and copy the local part."""
    drawn = copy.copy(layer)
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    drawn._parameters = {name: nn.Parameter(torch.zeros(shape_of(p))) for name, p in own.items()}
    drawn.reset_parameters()  # type: ignore[operator]
    for name, parameter in own.items():
        whole = drawn._parameters[name]
        assert whole is not None
        write(parameter, whole.detach().__getitem__)
