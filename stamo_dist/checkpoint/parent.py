"""The weights that a run begins with (`init_from`): another run's checkpoint, or an exported model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stamo_dist.checkpoint.load import open_source
from stamo_dist.checkpoint.manifest import MANIFEST, Checkpoint, damage, damaged, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import scan
from stamo_dist.checkpoint.source import Source, put_back
from stamo_dist.distributed.ranges import WEIGHT, Range
from stamo_dist.errors import CheckpointError, RunError
from stamo_dist.pretrained.checksums import verify
from stamo_dist.pretrained.files import header, weight_files
from stamo_dist.pretrained.place import ABOUT, EXPORTED, hub_failures, hub_id, not_supplied, snapshot, source
from stamo_dist.recipe.init_from import InitFrom
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.lineage import Weights

if TYPE_CHECKING:  # stamo_dist.models takes seconds, and only some parents need it
    from stamo_dist.models.shards import StoredTensor

FIELD = "init_from"
_FORMS = "give a run, a checkpoint, an exported model (RUN/model) or a hub id (owner/name[@revision])"


@dataclass(frozen=True)
class ParentWeights:
    """Opened weights of a parent.

    Attributes:
        location: What every process opens: a checkpoint, an export, or OWNER/NAME@COMMIT.
        run: The parent's run folder; where there is none, the location.
        stage: Of its recipe; None where an early checkpoint does not say.
        frozen: Beginnings of the fingerprints of the frozen parts that it was trained with, by name.
        digest: Beginning of a digest of its content; empty where there is none.
        open: Its tensors by the names of the module that is to have them.
    """

    location: str
    run: str
    stage: str | None
    step: int | None
    weights: Weights | None
    frozen: Mapping[str, str]
    digest: str
    open: Callable[[nn.Module], Source]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def described(self) -> str:
        """For the record in checkpoints, run folder and card."""
        if hub_id(self.location):
            return self.location
        more = [f"{self.weights} weights" if self.weights else "", self.digest]
        return f"{self.location} ({', '.join(filter(None, more))})" if any(more) else self.location


def locate(cfg: InitFrom, stage: str, say: Callable[[str], None]) -> str:
    """Find the weights and verify them, on one process; returns `ParentWeights.location`.

    Raises:
        RunError: There is nothing there, no whole checkpoint, or it is of another stage.
        CheckpointError: It is damaged, or of a form that is not read.
    """
    path = _path(cfg.path)
    if (path / "checkpoints").is_dir():
        path = _newest(path, say)
    try:
        if (path / MANIFEST).is_file():
            checkpoint = Checkpoint(path, read_checkpoint_manifest(path))
            if wrong := damage(*checkpoint):
                raise CheckpointError(f"{damaged(path, wrong)}; name an earlier one by its path, or an export")
    except CheckpointError as e:
        raise CheckpointError(f"{FIELD}: {e}") from None
    location = source(path.resolve())
    parent = open_parent(location, cfg)
    if parent.stage not in (stage, None):
        raise RunError(f"{FIELD}: {path} is of the {parent.stage} stage, and the recipe trains the {stage} stage")
    for folder in (path, path / "model"):  # an export, by its folder or its run's
        verify(folder, FIELD)
    return location


def open_parent(location: str, cfg: InitFrom) -> ParentWeights:
    """Open what `locate` found, by its index and headers alone.

    Raises:
        CheckpointError: It is damaged, has no such weights, or is of a form that is not read.
    """
    path = _path(location)
    if (path / MANIFEST).is_file():
        return _checkpoint(path, location, cfg)
    if cfg.weights is not None:
        raise CheckpointError(
            f"{FIELD}.weights: {path} is an exported model, which has one kind of weights; leave it out"
        )
    return _export(path, location)


def _path(given: str) -> Path:
    if "://" in given:
        raise RunError(f"{FIELD}: {given}: copy it here first (stamo sync {given} FOLDER), and give its folder")
    path, hub = Path(given).expanduser(), hub_id(given)
    if path.is_dir():
        return path
    if hub is None or path.parent.is_dir():
        what = "is no folder" if path.exists() else "is not there: it was moved or removed, or never made"
        raise RunError(f"{FIELD}: {given} {what}; {_FORMS}")
    try:
        return snapshot(*hub, list(EXPORTED))
    except hub_failures() as e:
        raise not_supplied(*hub, FIELD, e) from None


def _newest(run: Path, say: Callable[[str], None]) -> Path:
    found = scan(run / "checkpoints")
    newest = found.whole[0].path if found.whole else None
    for path, why in [*found.corrupt, *found.foreign]:
        if newest is None or path.name > newest.name:
            say(f"{FIELD}: not used: {why}")
    if newest is None:
        model = f"; its export is {run / 'model'}" if (run / "model").is_dir() else ""
        raise RunError(f"{FIELD}: {run} holds no whole checkpoint{model}; {_FORMS}")
    return newest


def _checkpoint(path: Path, location: str, cfg: InitFrom) -> ParentWeights:
    manifest = read_checkpoint_manifest(path)
    tensors = open_source(Checkpoint(path, manifest))
    if cfg.weights == "averaged" and not tensors.averaged:
        raise CheckpointError(f"{FIELD}.weights: averaged, but {path} has no average (train.ema); leave it out")
    kind: Weights = "averaged" if tensors.averaged and cfg.weights != "raw" else "raw"
    at = path.resolve()
    run = at.parents[1] if at.parent.name == "checkpoints" else at
    frozen = {k.removeprefix("model.frozen."): str(v) for k, v in manifest.recipe.items() if ".frozen." in k}
    step, of = manifest.state.step, _steps(run)
    unfinished = [f"{run} is not finished: step {step} of {of}"] if of and step < of else []
    digest = json.loads((path / MANIFEST).read_bytes()).get("sha256", "")[:12]
    stage = manifest.recipe.get("stage")
    return ParentWeights(location, str(run), stage, step, kind, frozen, digest, lambda module: tensors, unfinished)


def _steps(run: Path) -> int | None:
    """How many steps a run is to have."""
    import yaml

    try:
        return int(yaml.safe_load(RunFolder(run).resolved.read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _export(path: Path, location: str) -> ParentWeights:
    path = path if _about(path) else path / "model"
    about, at = _about(path), path.resolve()
    run = at.parent if at.name == "model" and RunFolder(at.parent).resolved.is_file() else None
    step = RunFolder(run).exported_step if run else None
    known: Mapping[str, Any] = {"tokenizer": about.get("tokenizer_fingerprint")}
    digest, folders = "", {"": path}
    if "frozen" in about:  # a tokenizer
        stage, known, digest = "tokenizer", about["frozen"], str(about.get("fingerprint") or "")[:12]
        parts = {"compressor.": "compressor", "decoder.transformer.": "transformer", "encoder.model.": "encoder"}
        folders = {prefix: path / name for prefix, name in parts.items()}
        if not (path / "encoder").is_dir() and "encoder" in about["frozen"]:
            del folders["encoder.model."]
        if lacking := [part for part in folders.values() if not part.is_dir()]:
            raise CheckpointError(f"{FIELD}: there is no {lacking[0]}, a part of the model; export or copy it again")
    elif about.get("_class_name") == "AutoencoderKL":
        stage, folders = "vae", {"model.": path}
    elif about.get("model_type") == "openvla" or "format" in about or (path / "adapter_config.json").is_file():
        stage = "policy"
    else:
        raise CheckpointError(f"{FIELD}: {path} is no run, checkpoint or model that is known; {_FORMS}")
    frozen = {name: str(fingerprint)[:12] for name, fingerprint in known.items() if fingerprint}
    if stage == "policy" and about.get("kind") != "diffusion":
        opened: Callable[[nn.Module], Source] = lambda network: _openvla(path, network)  # noqa: E731
    else:
        tensors = _of_folders(folders)
        opened = lambda module: tensors  # noqa: E731
    return ParentWeights(location, str(run or location), stage, step, None, frozen, digest, opened)


def _about(path: Path) -> dict[str, Any]:
    """What a folder says of the model in it; {} if nothing."""
    for name in ABOUT:
        if (path / name).is_file():
            try:
                found = json.loads((path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:
                raise CheckpointError(f"{FIELD}: {path / name} cannot be read ({e}); export or copy it again") from None
            return found if isinstance(found, dict) else {}
    return {}


def _of_folders(folders: Mapping[str, Path]) -> TensorSource:
    from stamo_dist.models import weights

    found: dict[str, StoredTensor] = {}
    for prefix, folder in folders.items():
        for file in weight_files(folder, FIELD):
            header(file, FIELD)
        found.update((f"{prefix}{name}", t) for name, t in weights.folder(folder, FIELD).stored.items())
    return TensorSource(found)


def _openvla(path: Path, network: Any) -> TensorSource:
    from stamo_dist.models.openvla import load as openvla

    checkpoint = openvla.locate(str(path))
    if checkpoint.adapter is not None:
        raise CheckpointError(f"{FIELD}: {path} is an adapter on a base; name it as policy.weights, which reads both")
    return TensorSource(openvla.stored(checkpoint.folder, network))


class TensorSource(Source):
    """Weights alone, of which rows can be read."""

    averaged = False

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors, self.trained = tensors, set[str]()
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def step(self, name: str) -> float:
        return 0.0

    def dtype(self, part: str, name: str) -> torch.dtype | None:
        return torch.float32 if part == WEIGHT and name in self._tensors else None

    def fill(self, ranges: Sequence[Range]) -> None:
        for r in ranges:
            for part in r.parts:
                if part != WEIGHT:
                    raise KeyError(f"a model lacks {part}.{r.name}")
                target = r.flat(part)
                target.copy_(_elements(self._tensors[r.name], r.start, r.numel))
                put_back(target, r.parts[part])


def _elements(tensor: StoredTensor, start: int, numel: int) -> Tensor:
    """Elements of a flattened tensor, of which only the rows that hold them are read."""
    if not tensor.shape or not numel:
        return tensor.whole().reshape(-1)[:numel]
    width = max(1, torch.Size(tensor.shape[1:]).numel())
    first, stop = start // width, -(-(start + numel) // width)
    rows = tensor.read((slice(first, stop), *(slice(None) for _ in tensor.shape[1:])))
    return rows.reshape(-1)[start - first * width :][:numel]
