"""Recipes that say which commit of the hub was read, so that whoever uses them again reads the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.policy import PolicyConfig
from stamo_dist.recipe.schema import DecoderConfig, EncoderConfig, Model, Recipe, VAEConfig

S = TypeVar("S", EncoderConfig, DecoderConfig, VAEConfig, PolicyConfig)


def pin(recipe: Recipe, sources: Mapping[str, str]) -> Recipe:
    """The recipe with its hub ids at these commits; `sources`: recipe field → what was found."""
    policy = _pinned(recipe.policy, sources.get("policy.weights"))
    return recipe.model_copy(update={"model": pin_model(recipe.model, sources), "policy": policy})


def pin_model(model: Model, sources: Mapping[str, str]) -> Model:
    """As `pin`, of a recipe's model."""
    parts = {
        "encoder": _pinned(model.encoder, sources.get("model.encoder.weights")),
        "decoder": _pinned(model.decoder, sources.get("model.decoder.weights")),
        "vae": _pinned(model.vae, sources.get("model.vae.weights")),
    }
    return model.model_copy(update=parts)


def as_begun(recipe: Recipe, sources: Mapping[str, str]) -> tuple[Recipe, list[str]]:
    """The recipe with hub ids that name no revision at the commits its run began with, and what a person should know.

    `sources`: as the checkpoint says. It may lack what is frozen, so a branch that moved would change the run.
    """
    sections: dict[str, EncoderConfig | DecoderConfig | VAEConfig | PolicyConfig] = {
        "policy.weights": recipe.policy,
        "model.encoder.weights": recipe.model.encoder,
        "model.decoder.weights": recipe.model.decoder,
        "model.vae.weights": recipe.model.vae,
    }
    begun = {}
    for field, section in sections.items():
        named = hub_id(section.weights) if section.weights else None
        if named and named[1] is None and sources.get(field, "").startswith(f"{named[0]}@"):
            begun[field] = sources[field]
    return pin(recipe, begun), [f"{field}: {at}, the commit that this run began with" for field, at in begun.items()]


def moved(sources: Mapping[str, str], begun: Mapping[str, str]) -> list[str]:
    """Which weights are of another commit than those a run began with, a line each; both: recipe field → place."""
    return [
        f"{field}: {found}, but this run began with {begun[field]}"
        for field, found in sources.items()
        if found != begun.get(field, found) and hub_id(found) and hub_id(begun[field])
    ]


def _pinned(section: S, found: str | None) -> S:
    hub = None if section.weights is None or found is None else hub_id(section.weights)
    # A part that was read back from an export lies elsewhere, and is named as it was.
    return section.model_copy(update={"weights": found}) if hub and str(found).startswith(f"{hub[0]}@") else section
