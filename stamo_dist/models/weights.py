"""Reading, checking and writing weights in the layouts of diffusers and transformers.

A checkpoint is a folder with `config.json` and safetensors (one file, or shards with an index). Its keys and shapes
are compared with the model's before a tensor is read: what does not fit is either a layer the caller announced will be
re-initialised, or an error that lists everything at once. Pickle files are never opened.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stamo_dist.errors import CheckpointError
from stamo_dist.models.shards import Stored

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
M = TypeVar("M", bound=nn.Module)

_STEMS = ("diffusion_pytorch_model", "model", "diffusion_pytorch_model.fp16", "model.fp16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LAYOUT = "give a folder in the layout of diffusers' or transformers' save_pretrained"
_LISTED = 20  # keys of one kind that an error message spells out


@dataclass(frozen=True)
class LoadReport:
    """What happened to every key of a checkpoint and of the model it was loaded into."""

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


def locate(weights: str, subfolders: Sequence[str], field: str, extra: Sequence[str] = ()) -> Path:
    """The folder that holds `config.json` of the checkpoint `weights`.

    `weights` is a local folder or a hub id; `subfolders` are tried in order ("" is the root). `field` is the recipe
    field that an error names. Hub files come from the local cache or are downloaded, no more of them than needed;
    `extra` are patterns of further files.

    Raises:
        CheckpointError: no such folder, none of the subfolders is there, or the hub could not be reached.
    """
    root = Path(weights).expanduser()
    if root.exists():
        for sub in subfolders:
            if (root / sub / "config.json").is_file():
                return root / sub
        unfinished = (root / "resolved.yaml").is_file()
        raise CheckpointError(
            f"{field}: there is no {_names(subfolders)} in {weights}; "
            + ("that run has not finished and exported its model" if unfinished else _LAYOUT)
        )
    if not _HUB_ID.fullmatch(weights):
        raise CheckpointError(
            f"{field}: there is no folder {weights}; give an existing folder or a hub id (owner/name)"
        )
    return _from_hub(weights, subfolders, field, extra)


def _names(subfolders: Sequence[str]) -> str:
    return " or ".join(f"{sub}/config.json" if sub else "config.json" for sub in subfolders)


def _from_hub(repo: str, subfolders: Sequence[str], field: str, extra: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    prefixes = [f"{sub}/" if sub else "" for sub in subfolders]
    try:
        for prefix in prefixes:
            stems = [f"{prefix}{stem}" for stem in _STEMS[:2]]
            index = [f"{prefix}config.json", *(f"{stem}.safetensors.index.json" for stem in stems)]
            root = Path(snapshot_download(repo, allow_patterns=index))
            if (root / prefix / "config.json").is_file():
                shards = [f"{stem}{tail}.safetensors" for stem in stems for tail in ("", "-?????-of-?????")]
                return Path(snapshot_download(repo, allow_patterns=[*index, *shards, *extra])) / prefix
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{field}: there is no folder {repo}, and the hub did not supply it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[-1]}). On a machine with network (and, for gated models, after "
            f"`hf auth login`) run `hf download {repo} --local-dir DIR` and set {field}: DIR"
        ) from error
    raise CheckpointError(
        f"{field}: there is no {_names(subfolders)} in {repo} on the hub; give a repository in the layout of diffusers "
        "or transformers (Stable Diffusion 3: stabilityai/stable-diffusion-3-medium-diffusers)"
    )


def read_config(folder: Path, field: str, kind: tuple[str, str]) -> dict[str, Any]:
    """`config.json` of a checkpoint folder; `kind` is the (key, value) that tells the class it belongs to.

    Raises:
        CheckpointError: the file is missing, is not JSON or belongs to another class.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{field}: {path} cannot be read ({error}); download the checkpoint again") from error
    key, value = kind
    found = config.get(key) if isinstance(config, dict) else None
    if found != value:
        raise CheckpointError(f"{field}: {path} says {key} {found}, expected {value}; give a checkpoint of that class")
    return config


def unknown_keys(config: Mapping[str, Any], known: Iterable[str], field: str) -> list[str]:
    """One problem for each key of `config` that the model class does not know, with the nearest known ones."""
    known, problems = sorted(known), []
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            problems.append(f"{field}.{key}: unknown field" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return problems


def weight_files(folder: Path, field: str) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or those that its index names.

    Raises:
        CheckpointError: there are none, or some that the index names are missing.
    """
    for stem in _STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{field}: {index} is not a weight index ({error}); download it again") from error
            absent = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
            if absent:
                raise CheckpointError(f"{field}: {index} names files that are not there: {', '.join(absent)}")
            return [folder / n for n in names]
        if single.is_file():
            return [single]
    other = sorted(p.name for p in folder.glob("*.bin"))
    hint = f" ({', '.join(other)} is pickle, which is never opened: save it again as safetensors)" if other else ""
    raise CheckpointError(
        f"{field}: {folder} has no {_STEMS[0]}.safetensors and no {_STEMS[1]}.safetensors{hint}"
        + ("" if hint else "; copy or download the checkpoint again")
    )


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
    # A layer is re-initialised as a whole: a bias that was trained beside another weight means nothing.
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
    build: Callable[[], M], folder: Path, field: str, reinitialise: Collection[str] = (),
    later: dict[str, Stored] | None = None,
) -> tuple[M, LoadReport]:  # fmt: skip
    """Build a model with the weights of a checkpoint folder, in float32 on the CPU.

    `build` is called on the meta device, so memory holds the weights once. Layers named in `reinitialise` whose shape
    differs from the checkpoint's keep PyTorch's initialisation and are reported. With `later` the parameters stay
    without memory, and what is to be read into each is put there.

    Raises:
        CheckpointError: files are missing or corrupt, or any other key or shape differs; all of them are listed.
    """
    with torch.device("meta"):
        model = build()
    files = [open_file(path, field) for path in weight_files(folder, field)]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a mapping)
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in where.items()}
    report = _compare(model, shapes, str(folder), reinitialise)
    if not report.fits:
        raise CheckpointError(f"{field}: the checkpoint does not fit the model\n{report}")

    loaded = report.loaded
    if later is not None:
        parameters = dict(model.named_parameters())
        later.update({key: Stored.in_file(where[key], key) for key in loaded if key in parameters})
        loaded = tuple(key for key in loaded if key not in parameters)
    tensors = {key: _as_float32(where[key].get_tensor(key)) for key in loaded}
    model.load_state_dict(tensors, assign=True, strict=False)
    for layer in sorted({_layer(key) for key in report.reinitialised}):
        module = model.get_submodule(layer)
        module.to_empty(device="cpu")
        module.reset_parameters()  # type: ignore[operator]
    _fill_buffers(model, build)
    if report.reinitialised:
        log.warning("%s: %s", field, report)
    return model, report


def _as_float32(tensor: Tensor) -> Tensor:
    # A copy even where the dtype is right: the file may be replaced while the run lives.
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
    state: Mapping[str, Tensor], folder: Path, *, stem: str = "model", dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
) -> None:  # fmt: skip
    """As `save`, in files of at most `shard_size` and an index where one does not do."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: cast(v, dtype) for k, v in state.items()}
    save_torch_state_dict(tensors, folder, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard_size)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, whole numbers as they are."""
    kept = dtype is None or not tensor.is_floating_point()
    return tensor.detach().to("cpu", tensor.dtype if kept else dtype).contiguous()


def written(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """What `load` makes of a tensor that `save` has cast to `dtype`."""
    return lambda tensor: _as_float32(cast(tensor, dtype))


def fingerprint(
    config: Mapping[str, Any], state: Mapping[str, Tensor], seen: Callable[[Tensor], Tensor] = Tensor.detach
) -> str:
    """SHA-256 over a configuration and named tensors (name, dtype, shape, bytes), in any order.

    `seen`: what to take in place of each tensor.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = seen(state[name]).detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
