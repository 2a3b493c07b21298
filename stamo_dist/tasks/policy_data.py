"""The data of a policy besides frames, checked before training: instructions, statistics, sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers' models
from stamo_dist.data.instructions import Instructions, episode_tables
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schema import Stats, scaling_notes
from stamo_dist.data.supervised import Supervision
from stamo_dist.errors import CheckpointError, DataError, RecipeError, StamoError
from stamo_dist.models import weights
from stamo_dist.models.exported import exported
from stamo_dist.models.openvla import load
from stamo_dist.models.openvla.actions import SETTINGS, SeenAs, Statistics, ValueRange
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.framing import Framing
from stamo_dist.recipe.policy import PolicyConfig
from stamo_dist.recipe.schema import Recipe

_SPLIT = "train"  # the split of which `stamo data stats` stores statistics
_LOOKED_AT = 64  # samples per source that are compared with its statistics before training


class PolicyData:
    """Read from manifests and episode tables, without reading frames or building a model.

    Attributes:
        checkpoint: The checkpoint to start from, if any.
        config: The network's configuration.
        instructions: The instruction of each sample.
        statistics: Statistics of each source with actions, as stored for inference.
        actions, proprio: Range of each source, None if it has none or the policy does not read it.
        notes: Lines on the number of samples per loss, and on dimensions with special scaling.

    Raises:
        StamoError: The policy cannot be trained on this data; lists all problems.
    """

    def __init__(self, recipe: Recipe, mixture: Mixture):
        cfg = recipe.policy
        self.checkpoint, self.config = network_config(cfg)
        window = mixture.window
        assert window is not None, "a policy's recipe has a horizon"
        problems: list[str] = _image_size(cfg, self.config, recipe.data.image_size)
        self.notes: list[str] = []
        try:
            tables = episode_tables(mixture)
            supervision = Supervision(recipe, tables)
            problems += supervision.problems
            self.notes += supervision.lines
            self.instructions = Instructions(mixture, tables)
        except DataError as error:
            problems += str(error).splitlines()
        if cfg.proprio and not window.proprio_dim:
            problems.append("policy.proprio: no source has proprioception; set policy.proprio: false")
        found: dict[str, dict[str, Any]] = {}
        self.actions: list[ValueRange | None] = []
        self.proprio: list[ValueRange | None] = []
        for number, name in enumerate(mixture.sources):
            columns = self._read_statistics(mixture, number, cfg, problems)
            if columns:
                manifest = mixture.opened[number][0].manifest
                split = manifest.splits[mixture.data.sources[name].split]
                found[name] = {**columns, "num_transitions": split.frames, "num_trajectories": split.episodes}
            for column, ranges in (("action", self.actions), ("proprio", self.proprio)):
                where = f"data.sources.{name}: {column}"
                values = columns.get(column)
                ranges.append(None if values is None else ValueRange.from_statistics(values, cfg.bounds, where))
        if problems:
            head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise DataError("\n".join([f"{head} in the policy's data:", *(f"  - {p}" for p in problems)]))
        # The centre crop matching the training crops; shards hold upright frames.
        self.framing = Framing(crop=mixture.data.augment.middle)
        self.statistics = Statistics(found, "the recipe's sources", {name: _seen(mixture, name) for name in found})

    def _read_statistics(
        self, mixture: Mixture, number: int, cfg: PolicyConfig, problems: list[str]
    ) -> dict[str, dict[str, Any]]:
        """Statistics by column, for the columns that the policy reads from source `number`; extends problems, notes."""
        window = mixture.window
        assert window is not None, "a policy's recipe has a horizon"
        name, folders = mixture.sources[number], mixture.opened[number]
        manifests = [folder.manifest for folder in folders]
        has_actions = mixture.data.sources[name].actions and any(m.action_dim for m in manifests)
        has_proprio = cfg.proprio and mixture.data.sources[name].actions and any(m.proprio_dim for m in manifests)
        if (has_actions or has_proprio) and len(folders) > 1:
            problems.append(
                f"data.sources.{name}: has {len(folders)} folders with statistics of their own; make each a source"
            )
            return {}
        path, stats = folders[0].path, manifests[0].stats
        wanted = {"action": (has_actions, window.action_dim), "proprio": (has_proprio, window.proprio_dim)}
        found: dict[str, dict[str, Any]] = {}
        for column, (read, dim) in wanted.items():
            if not read:
                continue
            if column not in stats:
                problems.append(
                    f"data.sources.{name}: {path} has no statistics of its {column}; run `stamo data stats {path}`"
                )
            elif len(stats[column].q01) != dim:
                problems.append(
                    f"data.sources.{name}: {path} has {len(stats[column].q01)} numbers of {column}, others have "
                    f"{dim}; leave one out or set its actions: false"
                )
            elif wrong := _stale(mixture, number, column, stats[column], path):
                problems.append(f"data.sources.{name}: {wrong}; run `stamo data stats {path}` again")
            else:
                found[column] = stats[column].for_scaling().model_dump()
                self.notes += [f"{name}: {note}" for note in scaling_notes(manifests[0], column, stats[column])]
        return found


def _seen(mixture: Mixture, name: str) -> SeenAs:
    source, manifest = mixture.data.sources[name], mixture.opened[mixture.sources.index(name)][0].manifest
    cameras = tuple(source.cameras or manifest.cameras)
    return SeenAs(manifest.source_format, cameras, mixture.data.image_size, manifest.frame_size)


def _stale(mixture: Mixture, number: int, column: str, stats: Stats, path: str | Path) -> str | None:
    """Why a source's statistics do not match its frames, judged by their number and by samples of the first shard."""
    opened, split = mixture.opened[number][0], mixture.data.sources[mixture.sources[number]].split
    frames = opened.manifest.splits[_SPLIT].frames if _SPLIT in opened.manifest.splits else stats.count
    if stats.count != frames:
        return f"{path} has statistics of {stats.count} frames, but {frames} frames"
    first = int(np.searchsorted(mixture.shard_source, number))
    if split != _SPLIT or not Path(mixture.shards[first].path).is_file():  # a remote shard is not fetched yet
        return None
    shard, low, high = mixture.views[0].open(first), np.array(stats.min), np.array(stats.max)
    slack = 1e-6 * np.maximum(np.abs(low), np.abs(high)) + 1e-6  # statistics are stored rounded
    for i in np.unique(np.linspace(0, len(shard) - 1, _LOOKED_AT).astype(int)).tolist():
        values = np.ravel(shard.sample(i, [column])[column])
        for place in np.flatnonzero((values < low - slack) | (values > high + slack)).tolist():
            return (
                f"{shard.describe(i)}: {column}[{place}] is {values[place]:.6g}, outside the statistics' "
                f"{low[place]:.6g} … {high[place]:.6g}"
            )
    return None


def network_config(cfg: PolicyConfig) -> tuple[load.PolicyCheckpoint | None, OpenVLAConfig]:
    """The checkpoint `policy.weights`, if there are any, and the network's configuration.

    Raises:
        RecipeError: fields of `policy.config` that OpenVLA or Llama does not have, or that contradict `policy.weights`.
        CheckpointError: the checkpoint is missing or of another model.
    """
    if cfg.weights is not None:
        checkpoint = load.locate(cfg.weights)
        folder = checkpoint.holding("config.json")
        config = OpenVLAConfig.from_folder(folder, load.FIELD, cfg.config.get("timm_kwargs") or ())
        if problems := _contradictions(cfg.config, config, folder):
            raise RecipeError(problems)
        if cfg.vision == "fused" and not config.towers:
            problem = (
                f"policy.vision: fused, but {folder} has no towers of its own: it sees through a StaMo encoder; set "
                "policy.vision: stamo, or give other policy.weights"
            )
            raise RecipeError([problem])
        return checkpoint, config.with_vision(cfg.vision)
    problems = weights.unknown_keys(cfg.config, [*OPENVLA_7B, "timm_kwargs"], "policy.config")
    text: Mapping[str, Any] = cfg.config.get("text_config") or {}
    problems += weights.unknown_keys(text, [*LlamaConfig().to_dict(), "torch_dtype"], "policy.config.text_config")
    if problems:
        raise RecipeError(problems)
    raw = {**OPENVLA_7B, **cfg.config, "text_config": {**OPENVLA_7B["text_config"], **text}}
    config = OpenVLAConfig.from_dict(raw, "policy.config")
    if config.pad != config.text_vocabulary:
        problem = (
            f"policy.config.pad_token_id: {config.pad}, but a text tokenizer learnt from the instructions pads with "
            f"{config.text_vocabulary}: text_config.vocab_size less pad_to_multiple_of"
        )
        raise RecipeError([problem])
    return None, config.with_vision(cfg.vision)


def check_state_encoder(checkpoint: load.PolicyCheckpoint | None, cfg: PolicyConfig, fingerprint: str | None) -> None:
    """Check that weights trained with a StaMo tokenizer continue with the same one.

    Raises:
        CheckpointError: The tokenizer differs.
    """
    settings = checkpoint.holding(SETTINGS) / SETTINGS if checkpoint is not None else None
    if settings is None or cfg.vision != "stamo" or not settings.is_file():
        return
    before = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_fingerprint")
    if before not in (None, fingerprint):
        raise CheckpointError(
            f"policy.weights: {settings.parent} was trained to see through another StaMo tokenizer than "
            f"{cfg.tokenizer}; set policy.tokenizer to that one"
        )


def _contradictions(given: Mapping[str, Any], config: OpenVLAConfig, folder: Path) -> list[str]:
    """Fields of `policy.config` that contradict the checkpoint, which takes precedence."""
    text: Mapping[str, Any] = given.get("text_config") or {}
    has = config.text.to_dict()
    rows = [
        (key, value, config.raw.get(key)) for key, value in given.items() if key not in ("text_config", "timm_kwargs")
    ]
    rows += [(f"text_config.{key}", value, has.get(key)) for key, value in text.items() if key != "torch_dtype"]
    return [
        f"policy.config.{key}: {value}, but {folder} has {found}; the weights decide: remove it, or set "
        "policy.weights: null to start at random"
        for key, value, found in rows
        if value != found
    ]


def _image_size(cfg: PolicyConfig, config: OpenVLAConfig, frames: int) -> list[str]:
    wanted = {f"policy.vision: {cfg.vision}": [tower.image_size] for tower in config.towers}
    problems = []
    if cfg.tokenizer is not None and (cfg.world is not None or cfg.vision == "stamo"):
        try:
            about = exported(cfg.tokenizer)[1]
            # Its encoder resizes frames.
            wanted["policy.tokenizer"] = [about["image_size"], about["model"]["encoder"]["image_size"]]
        except StamoError as error:
            problems.append(f"policy.tokenizer: {error}")
    problems += [
        f"data.image_size: frames of {frames} px, but {reader} reads {sizes[0]} px; convert the data with --size "
        f"{sizes[0]} and set data.image_size: {sizes[0]}"
        for reader, sizes in wanted.items()
        if frames not in sizes
    ]
    return problems
