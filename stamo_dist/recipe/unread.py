"""Fields that a recipe sets and its stage does not read, and steps that its run does not reach."""

from __future__ import annotations

from stamo_dist.recipe.difference import value_of
from stamo_dist.recipe.load import Loaded
from stamo_dist.recipe.policy import OpenVLAPolicyConfig
from stamo_dist.recipe.schema import Flow, Model

_UNREAD = {
    "tokenizer": ("policy", "model.vae.kl_weight", "model.vae.l1_weight", "model.vae.mse_weight"),
    "vae": ("policy", "flow", "model.encoder", "model.compressor", "model.decoder"),
    "policy": ("model", "flow"),
}
_INSTEAD = {"policy": "; a policy's tokenizer is that of policy.tokenizer"}
_LISTED = 3


def unread(loaded: Loaded) -> list[str]:
    """A line for each section that has no effect in the recipe's stage and is set to other values than the defaults."""
    stage, notes = loaded.recipe.stage, []
    sections = {"model": Model(), "flow": Flow(), "policy": OpenVLAPolicyConfig()}
    defaults = {name: section.model_dump(mode="json") for name, section in sections.items()}
    for name in _UNREAD[stage]:
        below = [f for f in loaded.provenance if f == name or f.startswith(f"{name}.")]
        given = [f for f in below if loaded.provenance[f] != "default"]
        if given := [f for f in given if value_of(defaults, f) != value_of(loaded.resolved, f)]:
            more = f" and {len(given) - _LISTED} more" if len(given) > _LISTED else ""
            fields = ", ".join(f"{f} ({loaded.provenance[f]})" for f in given[:_LISTED])
            notes.append(f"no effect in the {stage} stage: {fields}{more}{_INSTEAD.get(stage, '') * (name == 'model')}")
    return notes + _beyond(loaded)


def _beyond(loaded: Loaded) -> list[str]:
    """A line for each field that changes at steps after the last."""
    train, sources = loaded.recipe.train, loaded.recipe.data.sources
    fields = {f"data.sources.{name}.weight": source.weight for name, source in sources.items()}
    notes = []
    for field, value in {"train.global_batch": train.global_batch, **fields}.items():
        later = [at for at in value if at >= train.steps] if isinstance(value, dict) else []
        if later:
            place = loaded.provenance[field]
            notes.append(f"no effect: {field} ({place}) after step {later[0]}: the run ends at step {train.steps}")
    return notes
