"""Reading checkpoints into a policy, tensor by tensor: no process ever holds more than its own shards and one tensor.

with on_meta():
    network = PolicyNetwork(...)                           # shapes only
filling = Filling(network, stored(folder, network), ...)   # compares names and shapes
engine shards it, or does not
materialise(network, device)                               # memory for the local shards
filling.write(network)                                     # each process reads its slices of the mapped files
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.openvla.policy_network import PolicyNetwork
from stamo_dist.models.shards import Slices, Stored, materialise, on_meta, write
from stamo_dist.models.weights import LoadReport
from stamo_dist.pretrained import place
from stamo_dist.pretrained.files import weight_files
from stamo_dist.pretrained.reading import KINDS
from stamo_dist.recipe.policy import Policy

log = logging.getLogger(__name__)

FIELD = "policy.weights"
__all__ = [
    "Filling", "Stored", "fill", "fresh_parts", "has_part", "locate", "materialise", "on_meta", "part", "stored",
]  # fmt: skip

HEADS = ("action_head", "proprio_projector", "world_head")
LANGUAGE = "language_model"  # subfolder of exports whose language model plain transformers opens
NOTHING = r"(?!)"
#: What a hub repository has beside config.json and the weights.
EXTRA_FILES = ("*.json", "language_model/*", "*_checkpoint.pt", *(f"{part}.safetensors" for part in HEADS))
_LORA_ALPHA = 16  # of the official fine-tuning, min(rank, 16)


def fresh_parts(cfg: Policy) -> str:
    """What a checkpoint may lack when training starts from it, for `fill`."""
    parts = [rf"{part}\." for part in HEADS] + [r"vla\.state_projector\."]
    if cfg.film:
        parts.append(r"vla\.vision_backbone\.\w+\.blocks\.\d+\.(scale|shift)\.")
    if cfg.vision != "fused":
        parts.append(r"vla\.projector\.")
    return "|".join(parts)


def locate(checkpoint: str) -> Path:
    """Where a checkpoint lies: its own folder, or what the hub supplies.

    Raises:
        CheckpointError: there is no such folder, and the hub did not supply it.
    """
    return place.locate(checkpoint, KINDS["policy"].subfolders, FIELD, EXTRA_FILES)


def stored(folder: Path, network: PolicyNetwork) -> dict[str, Stored]:
    """What a checkpoint folder holds, by the names of `network`.

    Reads the released layouts: OpenVLA's safetensors; OFT's `action_head--*_checkpoint.pt`, `proprio_projector--*` and
    `vision_backbone--*` beside them (the last with adapters inside, which are merged); and our own, where the extra
    parts are safetensors.

    Raises:
        CheckpointError: files are missing, damaged, or there are several of one part.
    """
    found = {f"vla.{_vla_name(k, network)}": v for k, v in _safetensors(weight_files(folder, FIELD)).items()}
    if (folder / LANGUAGE / "config.json").is_file():
        language = _safetensors(weight_files(folder / LANGUAGE, FIELD))
        found.update({f"vla.language_model.{key}": tensor for key, tensor in language.items()})
    for head in HEADS:
        if getattr(network, head) is not None:
            found.update({f"{head}.{k}": v for k, v in part(folder, head).items()})
    if network.vla.film:
        towers = _merge_adapters(part(folder, "vision_backbone"))
        found.update({f"vla.{_vla_name(k, network)}": v for k, v in towers.items()})
    return found


def has_part(folder: Path, name: str) -> bool:
    """Whether a folder has a file of an extra part."""
    return _part_file(folder, name) is not None


def part(folder: Path, name: str) -> dict[str, Stored]:
    """What a folder has of an extra part; nothing if there is no file of it."""
    file = _part_file(folder, name)
    return {k.removeprefix("module."): v for k, v in _tensors(file).items()} if file else {}


def _vla_name(key: str, network: PolicyNetwork) -> str:
    key = re.sub(r"^vision_backbone\.vision_backbone\.", "vision_backbone.", key)
    if network.vla.film:
        key = re.sub(r"(featurizer\.blocks\.\d+\.)(?!block\.|scale\.|shift\.)", r"\1block.", key)
    return key


def _part_file(folder: Path, part: str) -> Path | None:
    files = [*folder.glob(f"{part}--*checkpoint.pt"), *folder.glob(f"{part}.safetensors")]
    if len(files) > 1:
        names = ", ".join(sorted(f.name for f in files))
        raise CheckpointError(f"{FIELD}: {folder} has several of {part}: {names}; keep the one you mean")
    return files[0] if files else None


def _tensors(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return _safetensors([path])
    return {key: Stored.in_memory(tensor) for key, tensor in weights.unpickled(path, FIELD).items()}


def _safetensors(paths: Iterable[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in paths:
        file = weights.open_file(path, FIELD)
        found.update({key: Stored.in_file(file, key) for key in file.keys()})  # noqa: SIM118 (not a mapping)
    return found


def _merge_adapters(state: Mapping[str, Stored]) -> dict[str, Stored]:
    merged = {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}
    for key, a in state.items():
        if ".lora_A." not in key:
            continue
        name = f"{key.partition('.lora_A.')[0]}.weight"
        merged[name] = _merged(merged[name], a, state[key.replace(".lora_A.", ".lora_B.")])
    return merged


def _merged(base: Stored, a: Stored, b: Stored) -> Stored:
    def read(slices: Slices) -> Tensor:
        down, up = (s.whole().float() for s in (a, b))
        rank = len(down)
        delta = (up.flatten(1) @ down.flatten(1)).view(base.shape) * (min(rank, _LORA_ALPHA) / rank)
        return base.read(slices).float() + delta[slices]

    return Stored(base.shape, read)


class Filling:
    """A checkpoint compared with a network, and then copied into its parameters, each process its own shards.

    Layers whose names begin as the pattern `fresh` says get an initialisation (the same on any number of processes)
    where the checkpoint lacks them or has them in another shape. Adapters always do: they start as the identity. What
    the checkpoint has of towers that this network does not use is left unread.
    """

    def __init__(
        self, network: PolicyNetwork, found: Mapping[str, Stored], source: str, *, fresh: str = NOTHING, seed: int = 0
    ):
        """Only names and shapes are looked at; the network may be without memory.

        Raises:
            CheckpointError: anything else is missing, unknown or has another shape; all of it is listed.
        """
        state = {name: t for name, t in network.state_dict().items() if ".lora_" not in name}
        plain = {name: name.replace(".base_layer.", ".") for name in state}
        shapes = {n: (found[p].shape, tuple(state[n].shape)) for n, p in plain.items() if p in found}
        differing = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
        absent = [n for n, p in plain.items() if p not in found]
        self._layers = {n.rpartition(".")[0] for n in (*absent, *differing) if re.match(fresh, plain[n])}
        redone = [n for n in plain if n.rpartition(".")[0] in self._layers]
        self.report = LoadReport(
            source=source,
            loaded=tuple(n for n in shapes if n not in differing and n not in redone),
            reinitialised={n: differing.get(n, ((), tuple(state[n].shape))) for n in redone},
            mismatched={n: pair for n, pair in differing.items() if n not in redone},
            missing=tuple(n for n in absent if n not in redone),
            unexpected=tuple(sorted(set(found) - set(plain.values()) - _unused(network, found))),
        )
        if not self.report.fits:
            raise CheckpointError(f"{FIELD}: the checkpoint does not fit the policy\n{self.report}")
        if redone:
            log.warning("%s: %s", FIELD, self.report)
        self._found, self._plain, self._seed = found, plain, seed

    @torch.no_grad()
    def write(self, network: PolicyNetwork) -> None:
        """Fill the network, sharded or not; its parameters have memory."""
        state = network.state_dict()
        for name in self.report.loaded:
            write(state[name], self._found[self._plain[name]].read)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            for layer in sorted(self._layers):
                _reset(network.get_submodule(layer))
            for name, tensor in state.items():
                if ".lora_" in name:
                    start = torch.zeros(tensor.shape)
                    # Peft's gaussian start.
                    drawn = start if ".lora_B." in name else start.normal_(std=1 / tensor.shape[0])
                    write(tensor, drawn.__getitem__)


def fill(
    network: PolicyNetwork, found: Mapping[str, Stored], source: str, *, fresh: str = NOTHING, seed: int = 0
) -> LoadReport:
    """Compare and write at once; see `Filling`."""
    filling = Filling(network, found, source, fresh=fresh, seed=seed)
    filling.write(network)
    return filling.report


def _unused(network: PolicyNetwork, found: Mapping[str, Stored]) -> set[str]:
    """Towers that the network has not: it reads one of two, or a StaMo encoder instead."""
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
    """Draw a layer's initial values whole, on the CPU, and copy what is local."""
    drawn = copy.copy(layer)
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    drawn._parameters = {name: nn.Parameter(torch.zeros(p.shape)) for name, p in own.items()}
    drawn.reset_parameters()  # type: ignore[operator]
    for name, parameter in own.items():
        whole = drawn._parameters[name]
        assert whole is not None
        write(parameter, whole.detach().__getitem__)
