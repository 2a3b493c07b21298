"""Reading, checking and writing weights in the layouts of diffusers and transformers.

A checkpoint is a folder with `config.json` and safetensors (one file, or shards with an index), or in one of the forms
that `pretrained.forms` knows. Its keys and shapes are compared with the model's before a tensor is read: every mismatch
is either in a layer that the caller allows to be re-initialised, or part of an error that lists all of them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.models.shards import Slices, StoredTensor
from stamo_dist.pretrained.files import Shape
from stamo_dist.pretrained.forms import JoinedTensor, Span
from stamo_dist.pretrained.place import locate, source
from stamo_dist.pretrained.reading import KINDS, differing, is_pickled, read, tensors

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_LISTED = 20  # keys of one kind that an error message spells out


@dataclass(frozen=True)
class LoadReport:
    """The outcome for every key of a checkpoint and of the model it was loaded into."""

    source: str
    loaded: tuple[str, ...]
    reinitialised: Mapping[str, tuple[Shape, Shape]]  # key → (shape in the checkpoint, shape in the model)
    mismatched: Mapping[str, tuple[Shape, Shape]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.mismatched or self.missing or self.unexpected)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"re-initialised {_change(k, v)}" for k, v in self.reinitialised.items()]
        lines += _listing("has another shape", [_change(k, v) for k, v in self.mismatched.items()])
        lines += _listing("missing in the checkpoint", self.missing)
        lines += _listing("unknown to the model", self.unexpected)
        return "\n  - ".join(lines)


def _change(key: str, shapes: tuple[Shape, Shape]) -> str:
    return f"{key}: {list(shapes[0])} in the checkpoint, {list(shapes[1])} in the model"


def _listing(what: str, keys: Sequence[str]) -> list[str]:
    more = [f"… and {len(keys) - _LISTED} more {what}"] if len(keys) > _LISTED else []
    return [f"{what}: {key}" for key in keys[:_LISTED]] + more


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """A checkpoint of a part of the model, by the names of our classes; its tensors are read lazily."""

    field: str  # of the recipe, for errors
    source: str  # the path, or OWNER/NAME@COMMIT
    config: dict[str, Any]
    stored: dict[str, StoredTensor]


def find(weights: str, part: str, field: str, config: Mapping[str, Any] = MappingProxyType({})) -> PretrainedCheckpoint:
    """Open the weights that a recipe names for a part of the model ("encoder", "decoder", "vae").

    `config`: the recipe's config fields for this part.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another model.
        RecipeError: the recipe's `config` is not that of the checkpoint.
    """
    checkpoint = opened(locate(weights, KINDS[part].subfolders, field), part, field)
    if problems := differing(config, checkpoint.config, field.removesuffix(".weights"), weights):
        raise RecipeError(problems)
    return checkpoint


def opened(path: Path, part: str, field: str) -> PretrainedCheckpoint:
    """Open a checkpoint that was located.

    Raises:
        CheckpointError: it is incomplete or of another model.
    """
    if is_pickled(path):
        loaded = unpickled(path, field)
        headers = read(path, part, field, {key: tuple(tensor.shape) for key, tensor in loaded.items()})
        whole = {key: StoredTensor.in_memory(tensor) for key, tensor in loaded.items()}
    else:
        headers = read(path, part, field)
        whole = _stored(headers.files, field)
    stored = {name: _assembled(part, whole) for name, part in headers.parts.items()}
    return PretrainedCheckpoint(field, source(path), headers.config, stored)


def folder(path: Path, field: str) -> PretrainedCheckpoint:
    """Open the tensors of a folder written by us, without checking its config.json.

    Raises:
        CheckpointError: files are missing or corrupt.
    """
    return PretrainedCheckpoint(field, source(path), {}, _stored(tensors(path, field)[1], field))


def _stored(files: Mapping[str, Path], field: str) -> dict[str, StoredTensor]:
    maps = {path: open_file(path, field) for path in set(files.values())}
    return {key: StoredTensor.in_file(maps[path], key) for key, path in files.items()}


def _assembled(part: JoinedTensor, whole: Mapping[str, StoredTensor]) -> StoredTensor:
    first = part.spans[0]
    if len(part.spans) == 1 and first.key and whole[first.key].shape == part.shape:
        return whole[first.key]

    def read(slices: Slices) -> Tensor:
        pieces = [_span(span, part, whole) for span in part.spans]
        return torch.cat(pieces, part.axis).view(part.shape)[slices]

    return StoredTensor(part.shape, read)


def _span(span: Span, part: JoinedTensor, whole: Mapping[str, StoredTensor]) -> Tensor:
    if not span.key:
        shape = list(part.shape)
        shape[part.axis] = span.stop - span.start
        return torch.zeros(shape)
    tensor = whole[span.key]
    everything = [slice(None)] * len(tensor.shape)
    everything[part.axis] = slice(span.start, span.stop)
    return tensor.read(tuple(everything))


def unpickled(path: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, mapped into memory; only tensors are unpickled.

    Raises:
        CheckpointError: it is damaged, or holds other objects.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it is no map of tensors")
    except Exception as error:  # a damaged zip, a foreign class or no map of tensors
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{field}: {path} is no map of tensors, or is incomplete ({why}); download it again, or write its "
            "state dict alone with torch.save"
        ) from error
    return state


def unknown_keys(config: Mapping[str, Any], known: Iterable[str], field: str) -> list[str]:
    """One problem for each key of `config` that the model class does not know, with the nearest known ones."""
    known, problems = sorted(known), []
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            problems.append(f"{field}.{key}: unknown field" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return problems


def open_file(path: Path, field: str) -> Any:
    """A safetensors file, mapped into memory.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{field}: {path} is corrupt or incomplete ({error}); copy or download it again"
        ) from error


def _compare(model: nn.Module, shapes: Mapping[str, Shape], source: str, reinitialise: Collection[str]) -> LoadReport:
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    differing = {k: (shapes[k], expected[k]) for k in expected if k in shapes and shapes[k] != expected[k]}
    layers = {_layer(k) for k in differing} & set(reinitialise)
    # A layer is re-initialised as a whole: a bias trained with another weight is useless.
    redone = {k: (shapes[k], expected[k]) for k in expected if k in shapes and _layer(k) in layers}
    return LoadReport(
        source=source,
        loaded=tuple(k for k in expected if k in shapes and k not in redone and k not in differing),
        reinitialised=redone,
        mismatched={k: v for k, v in differing.items() if k not in redone},
        missing=tuple(k for k in expected if k not in shapes),
        unexpected=tuple(sorted(set(shapes) - set(expected))),
    )


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def load(
    build: Callable[[], M],
    checkpoint: PretrainedCheckpoint,
    reinitialise: Collection[str] = (),
    deferred: dict[str, StoredTensor] | None = None,
) -> tuple[M, LoadReport]:
    """Build a model with the weights of a checkpoint, in float32 on the CPU.

    `build` is called on the meta device, so memory holds the weights once. Layers named in `reinitialise` whose shape
    differs from the checkpoint's keep PyTorch's initialisation and are reported. With `deferred` the parameters stay
    on the meta device, and the stored tensor of each is put there.

    Raises:
        CheckpointError: any other key or shape differs; all of them are listed.
    """
    with torch.device("meta"):
        model = build()
    stored, field = checkpoint.stored, checkpoint.field
    report = _compare(model, {key: tensor.shape for key, tensor in stored.items()}, checkpoint.source, reinitialise)
    if not report.fits:
        raise CheckpointError(f"{field}: the checkpoint does not fit the model\n{report}")

    loaded = report.loaded
    if deferred is not None:
        parameters = dict(model.named_parameters())
        deferred.update({key: stored[key] for key in loaded if key in parameters})
        loaded = tuple(key for key in loaded if key not in parameters)
    model.load_state_dict({key: _as_float32(stored[key].whole()) for key in loaded}, assign=True, strict=False)
    for layer in sorted({_layer(key) for key in report.reinitialised}):
        module = model.get_submodule(layer)
        module.to_empty(device="cpu")
        module.reset_parameters()  # type: ignore[operator]
    _fill_buffers(model, build)
    if report.reinitialised:
        log.warning("%s: %s", field, report)
    return model, report


def _as_float32(tensor: Tensor) -> Tensor:
    # Copy even if the dtype is right: the file may be replaced while the run lives.
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def _fill_buffers(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Buffers that no checkpoint holds (not persistent) are computed by a second, real instance."""
    if not any(b.is_meta for b in model.buffers()):
        return
    real = dict(build().named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = real[name]


def save(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, cast to `dtype`, in the form that diffusers and transformers read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: cast(v, dtype) for k, v in state.items()}, path, metadata={"format": "pt"})


def save_shards(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    stem: str = "model",
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
) -> None:
    """As `save`, in files of at most `shard_size` and an index where one does not do."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: cast(v, dtype) for k, v in state.items()}
    save_torch_state_dict(tensors, folder, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard_size)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast floats on the CPU; integers are unchanged."""
    kept = dtype is None or not tensor.is_floating_point()
    return tensor.detach().to("cpu", tensor.dtype if kept else dtype).contiguous()


def written(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """The value that `load` returns for a tensor that `save` has cast to `dtype`."""
    return lambda tensor: _as_float32(cast(tensor, dtype))


def fingerprint(
    config: Mapping[str, Any], state: Mapping[str, Tensor], seen: Callable[[Tensor], Tensor] = Tensor.detach
) -> str:
    """SHA-256 over a configuration and named tensors (name, dtype, shape, bytes), in any order.

    `seen`: maps each tensor before hashing.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = seen(state[name]).detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
