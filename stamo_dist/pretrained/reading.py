"""Opening a checkpoint by its headers: its configuration, and the location of each tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stamo_dist.errors import CheckpointError
from stamo_dist.pretrained import forms
from stamo_dist.pretrained.files import PICKLED, Shape, header, pickled_names, unreadable, weight_files
from stamo_dist.pretrained.forms import CheckpointForm, JoinedTensor, Shapes


@dataclass(frozen=True)
class Kind:
    """The formats from which a part of the model can be read."""

    subfolders: tuple[str, ...]  # subfolders to search in the recipe's path
    key: str  # field of config.json with the class
    classes: tuple[str, ...]
    form: Callable[[Shapes], CheckpointForm | None] | None  # reads files with other tensor names
    convert: str  # advice for converting unreadable formats


_DINOV2 = ("dinov2", "dinov2_with_registers")
KINDS = {
    "encoder": Kind(
        ("", "encoder"),
        "model_type",
        _DINOV2,
        forms.dinov2,
        "give DINOv2 of transformers, timm or Meta (.pth), or load it with transformers and save_pretrained(DIR)",
    ),
    "decoder": Kind(
        ("transformer", ""),
        "_class_name",
        ("SD3Transformer2DModel",),
        forms.sd3,
        "give Stable Diffusion 3 or 3.5, or convert it with diffusers: "
        "SD3Transformer2DModel.from_single_file(FILE).save_pretrained(DIR)",
    ),
    # Stable Diffusion's layout, finished runs, the VAE itself.
    "vae": Kind(
        ("vae", "model/vae", "model", ""),
        "_class_name",
        ("AutoencoderKL",),
        forms.sd3_vae,
        "give the VAE of Stable Diffusion 3 or 3.5, or convert it with diffusers: "
        "AutoencoderKL.from_single_file(FILE).save_pretrained(DIR)",
    ),
    "policy": Kind(
        ("",),
        "model_type",
        ("openvla",),
        None,
        "give OpenVLA or OpenVLA-OFT, or convert Prismatic's .pt with the official convert_openvla_weights_to_hf.py",
    ),
}


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint. `parts`: model tensor → its stored parts; `files`, `shapes`: by stored tensor."""

    config: dict[str, Any]
    parts: dict[str, JoinedTensor]
    shapes: dict[str, Shape]
    files: dict[str, Path]


def is_pickled(path: Path) -> bool:
    return path.suffix in PICKLED


def read(path: Path, part: str, field: str, pickled: Shapes | None = None) -> OpenedCheckpoint:
    """Open a checkpoint of a part of the model without reading tensors.

    `pickled`: the shapes in a torch.save file, which only torch can read. `field`: the recipe field, for errors.

    Raises:
        CheckpointError: files are missing or damaged, or are of another model; the message says how to convert it.
    """
    kind = KINDS[part]
    if path.suffix in (".safetensors", *PICKLED) and path.is_file():
        shapes = dict(pickled) if pickled is not None else header(path, field)
        form = None if kind.form is None else kind.form(shapes)
        if form is None:
            raise CheckpointError(f"{field}: {path} {_unlike(shapes)}; {kind.convert}")
        return OpenedCheckpoint(form.config, form.parts, shapes, dict.fromkeys(shapes, path))
    if part == "encoder" and is_timm(path, field):
        shapes, files = tensors(path, field)
        if form := forms.dinov2(shapes):
            return OpenedCheckpoint(form.config, form.parts, shapes, files)
    config = read_config(path, part, field)
    shapes, files = tensors(path, field)
    return OpenedCheckpoint(
        config, {key: JoinedTensor.whole(key, shape) for key, shape in shapes.items()}, shapes, files
    )


def is_timm(folder: Path, field: str) -> bool:
    """Whether a folder holds a DINOv2 in timm's format."""
    return "dinov2" in str(read_json(folder / "config.json", field).get("architecture"))


def look(path: Path, part: str, field: str) -> OpenedCheckpoint | None:
    """As `read`, without torch; None for a torch.save file that looks right but cannot be checked further.

    Raises:
        CheckpointError: as `read`.
    """
    if not is_pickled(path):
        return read(path, part, field)
    names = pickled_names(path, field)
    if part != "encoder" or not all(name in names for name in (b"cls_token", b"pos_embed", b"blocks.0.attn.qkv")):
        raise CheckpointError(f"{field}: {path} does not hold that model; {KINDS[part].convert}")
    return None


def read_config(folder: Path, part: str, field: str) -> dict[str, Any]:
    """`config.json` of a checkpoint folder of a part of the model.

    Raises:
        CheckpointError: the file is missing, is not a JSON object, or belongs to another class.
    """
    path, kind = folder / "config.json", KINDS[part]
    config = read_json(path, field)
    if config.get(kind.key) not in kind.classes:
        raise CheckpointError(
            f"{field}: {path} says {kind.key} {config.get(kind.key)}, expected {' or '.join(kind.classes)}; "
            f"{kind.convert}"
        )
    return config


def read_json(path: Path, field: str) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except PermissionError as error:
        raise CheckpointError(unreadable(path, field, error)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{field}: {path} cannot be read ({error}); download the checkpoint again") from error
    return config


def tensors(folder: Path, field: str) -> tuple[dict[str, Shape], dict[str, Path]]:
    """(stored tensor → shape, stored tensor → file) of a folder.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    shapes: dict[str, Shape] = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder, field):
        of_file = header(path, field)
        shapes |= of_file
        files |= dict.fromkeys(of_file, path)
    return shapes, files


def differing(config: Mapping[str, Any], found: Mapping[str, Any], field: str, source: str) -> list[str]:
    """One problem for each field of a recipe's `config` that differs in the checkpoint's, `found`."""
    return [
        f"{field}.config.{key}: {value}, but {source} has {found[key]}; name other weights, or leave the field out"
        for key, value in config.items()
        if key in found and _plain(found[key]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _unlike(shapes: Mapping[str, Shape] | Sequence[str]) -> str:
    some = ", ".join(sorted(shapes)[:3])
    return f"does not hold that model (its tensors: {some}, …)"
