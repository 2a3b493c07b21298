"""Reading checkpoints into a policy tensor by tensor: a process holds only its own shards and one tensor.

checkpoint = locate(weights)                               # a folder, or an adapter's and its base's
with on_meta():
    network = PolicyNetwork(...)                           # shapes only
found, adapter = read(checkpoint, network)
loader = WeightLoader(network, found, adapter=adapter, ...) # compares names and shapes
adapters are inserted; an engine may shard it
materialise(network, device)                               # memory for the local shards
loader.write(network)                                      # each process reads its slices of the mapped files
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.exported import STATE_ENCODER
from stamo_dist.models.openvla import adapters
from stamo_dist.models.openvla.actions import SETTINGS
from stamo_dist.models.openvla.adapters import FIELD, Adapter, LowRank
from stamo_dist.models.openvla.policy_network import PolicyNetwork
from stamo_dist.models.openvla.weight_loader import WeightLoader
from stamo_dist.models.shards import StoredTensor, materialise, on_meta
from stamo_dist.pretrained import place
from stamo_dist.pretrained.files import weight_files
from stamo_dist.pretrained.reading import KINDS
from stamo_dist.recipe.policy import PolicyConfig

__all__ = [
    "FIELD",
    "PolicyCheckpoint",
    "StoredTensor",
    "WeightLoader",
    "fresh_parts",
    "has_part",
    "locate",
    "materialise",
    "on_meta",
    "part",
    "read",
    "stored",
]

HEADS = ("action_head", "proprio_projector", "world_head")
LANGUAGE = "language_model"  # subfolder of exports whose language model plain transformers opens
#: Further files of a hub repository, beside config.json and the weights.
EXTRA_FILES = (
    "*.json",
    "language_model/*",
    "*_checkpoint.pt",
    adapters.WEIGHTS,
    *(f"{part}.safetensors" for part in (*HEADS, "vision_backbone")),
    f"{STATE_ENCODER}/*",
)
OFT_ADAPTER = "lora_adapter"  # subfolder of the adapter in OFT's training, merged or not
_LORA_ALPHA = 16  # of the official fine-tuning, min(rank, 16)


def fresh_parts(cfg: PolicyConfig) -> str:
    """Parts that a checkpoint may lack when training starts from it, for `WeightLoader`."""
    parts = [rf"{part}\." for part in HEADS] + [r"vla\.state_projector\."]
    if cfg.film:
        parts.append(r"vla\.vision_backbone\.\w+\.blocks\.\d+\.(scale|shift)\.")
    if cfg.vision != "fused":
        parts.append(r"vla\.projector\.")
    return "|".join(parts)


@dataclass(frozen=True)
class PolicyCheckpoint:
    """The folders of a checkpoint: one, or an adapter's and its base's."""

    folder: Path  # the requested folder: heads, statistics, settings
    base: Path  # config and weights of the whole network; `folder` itself if it holds them
    name: str  # name of the base for others: an absolute path or a hub id
    adapter: Path | None = None  # folder of the adapter
    instead: str | None = None  # the base named by the adapter, if unavailable and `base` is the folder above

    def holding(self, name: str) -> Path:
        """The folder that has the file `name`; the base's if neither has it."""
        return self.folder if (self.folder / name).is_file() else self.base

    def part(self, name: str) -> dict[str, StoredTensor]:
        """As the function `part`, from the base if the adapter's folder has none."""
        return part(self.folder, name) or part(self.base, name)

    def sources(self) -> dict[str, str]:
        """Recipe field → location; for an adapter also its base's."""
        found = {FIELD: place.source(self.folder)}
        return found if self.base == self.folder else {**found, f"{FIELD} (base)": place.source(self.base)}

    def notes(self) -> list[str]:
        """Notes for the user on its folders."""
        notes = []
        if self.adapter is None and (self.folder / OFT_ADAPTER / adapters.CONFIG).is_file():
            notes.append(f"{self.folder / OFT_ADAPTER} is not read: OFT leaves it beside weights it is merged into")
        if self.instead is not None:
            notes.append(
                f"{FIELD}: {self.adapter} names {self.instead}, which is not to be had: {self.base} is its base"
            )
        return notes


def locate(checkpoint: str) -> PolicyCheckpoint:
    """Find a checkpoint's folder, or download it from the hub.

    The base of an adapter is the weights beside it, else those that its config names, or those in the folder above.

    Raises:
        CheckpointError: there is no such folder, it cannot be downloaded, or an adapter or its base is incomplete.
    """
    given = Path(checkpoint).expanduser()
    if given.name == OFT_ADAPTER and adapters.lies_in(given) and place.has_weights(given.parent):
        raise CheckpointError(
            f"{FIELD}: {given} is the adapter that OFT leaves beside the weights it is merged into; give {given.parent}"
        )
    if not place.has_weights(given):
        for adapter in (given, given / OFT_ADAPTER):
            if adapters.lies_in(adapter):
                return _on_base(given, adapter)
    folder = _place(checkpoint)
    if adapters.lies_in(folder) and not place.has_weights(folder):
        return _on_base(folder, folder)
    name = str(folder.resolve()) if given.exists() else checkpoint
    return PolicyCheckpoint(folder, folder, name, folder if adapters.lies_in(folder) else None)


def _place(checkpoint: str) -> Path:
    return place.locate(checkpoint, KINDS["policy"].subfolders, FIELD, EXTRA_FILES, adapters.CONFIG)


def _on_base(folder: Path, adapter: Path) -> PolicyCheckpoint:
    named = place.named_base(adapter, adapters.read_config(adapter))
    if place.has_weights(base := Path(named)):
        return PolicyCheckpoint(folder, _plain(base), str(base.resolve()), adapter)
    above = adapter.absolute().parent
    try:
        base = _place(named)
    except CheckpointError:
        if place.has_weights(above):
            return PolicyCheckpoint(folder, _plain(above), str(above.resolve()), adapter, instead=named)
        raise CheckpointError(
            f"{FIELD}: {adapter} is an adapter, and its base {named!r} is no folder with weights and not to be had "
            f"from the hub{_download(named)}; correct base_model_name_or_path in its {adapters.CONFIG}, or give the "
            f"base's folder with {adapters.CONFIG} and {adapters.WEIGHTS} in it"
        ) from None
    return PolicyCheckpoint(folder, _plain(base), place.source(base), adapter)


def _download(named: str) -> str:
    hub = place.hub_id(named)
    return f" (on a machine with network: `{place.download(*hub)}`)" if hub else ""


def _plain(base: Path) -> Path:
    if adapters.lies_in(base):
        raise CheckpointError(f"{FIELD}: {base} is the base of an adapter and has one itself; merge that with peft")
    return base


def read(checkpoint: PolicyCheckpoint, network: PolicyNetwork) -> tuple[dict[str, StoredTensor], Adapter | None]:
    """A checkpoint's tensors by the names of `network`, and its adapter, whose full parameters are in the first.

    Raises:
        CheckpointError: files are missing, damaged, or there are several of one part.
    """
    found = stored(checkpoint.base, network)
    if checkpoint.adapter is None:
        return found, None
    adapter = adapters.read(checkpoint.adapter, lambda key: f"vla.{_vla_name(key, network)}")
    if checkpoint.folder != checkpoint.base:
        if dtype := _base_dtype(checkpoint.folder):
            found = {name: tensor.rounded(dtype) for name, tensor in found.items()}
        beside = _beside(checkpoint.folder, network)
        if any(name.startswith("vla.vision_backbone.") for name in beside):  # their adapters are in that file
            towers = {name for name in adapter.layers if name.startswith("vla.vision_backbone.")}
            adapter = Adapter(
                adapter.folder, {k: v for k, v in adapter.layers.items() if k not in towers}, adapter.whole
            )
        found |= beside
    return {**found, **adapter.whole}, adapter


def _base_dtype(folder: Path) -> torch.dtype | None:
    """The dtype in which our training kept the base of an adapter folder."""
    path = folder / SETTINGS
    name = json.loads(path.read_text(encoding="utf-8")).get("base_dtype") if path.is_file() else None
    return None if name is None else getattr(torch, name)


def stored(folder: Path, network: PolicyNetwork) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder, by the names of `network`.

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
    return found | _beside(folder, network)


def _beside(folder: Path, network: PolicyNetwork) -> dict[str, StoredTensor]:
    """Tensors that a folder stores in separate files: heads, and towers with FiLM."""
    found: dict[str, StoredTensor] = {}
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


def part(folder: Path, name: str) -> dict[str, StoredTensor]:
    """The tensors of an extra part in a folder; {} if it has no file of it."""
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


def _tensors(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return _safetensors([path])
    return {key: StoredTensor.in_memory(tensor) for key, tensor in weights.unpickled(path, FIELD).items()}


def _safetensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in paths:
        file = weights.open_file(path, FIELD)
        found.update({key: StoredTensor.in_file(file, key) for key in file.keys()})  # noqa: SIM118 (not a mapping)
    return found


def _merge_adapters(state: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    merged = {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}
    for key, a in state.items():
        if ".lora_A." not in key:
            continue
        name = f"{key.partition('.lora_A.')[0]}.weight"
        low = LowRank(a, state[key.replace(".lora_A.", ".lora_B.")], min(a.shape[0], _LORA_ALPHA) / a.shape[0])
        merged[name] = low.added_to(merged[name])
    return merged
