"""Pinning a recipe's hub ids to the commits that were read, so that reusing it reads the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.policy import PolicyConfig
from stamo_dist.recipe.schema import DecoderConfig, EncoderConfig, Model, Recipe, VAEConfig

S = TypeVar("S", EncoderConfig, DecoderConfig, VAEConfig, PolicyConfig)


def pin(recipe: Recipe, sources: Mapping[str, str]) -> Recipe:
    """The recipe with its hub ids at these commits; `sources`: recipe field → location found."""
    policy = _pinned(recipe.policy, sources.get("policy.weights"))
    initial, found = recipe.init_from, sources.get("init_from", "")
    if initial and (hub := hub_id(initial.path)) and found.startswith(f"{hub[0]}@"):
        initial = initial.model_copy(update={"path": found})
    parts = {"model": pin_model(recipe.model, sources), "policy": policy, "init_from": initial}
    return recipe.model_copy(update=parts)


def pin_model(model: Model, sources: Mapping[str, str]) -> Model:
    """As `pin`, for a recipe's model."""
    parts = {
        "encoder": _pinned(model.encoder, sources.get("model.encoder.weights")),
        "decoder": _pinned(model.decoder, sources.get("model.decoder.weights")),
        "vae": _pinned(model.vae, sources.get("model.vae.weights")),
    }
    return model.model_copy(update=parts)


def as_begun(recipe: Recipe, sources: Mapping[str, str]) -> tuple[Recipe, list[str]]:
    """The recipe with unpinned hub ids at the commits its run began with, and notes for the user.

    `sources`: from the checkpoint. It may lack frozen weights, so a moved branch would change the run.
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
    """Lines on weights whose commit differs from the run's beginning; both arguments: recipe field → location."""
    return [
        f"{field}: {found}, but this run began with {begun[field]}"
        for field, found in sources.items()
        if found != begun.get(field, found) and hub_id(found) and hub_id(begun[field])
    ]


def _pinned(section: S, found: str | None) -> S:
    hub = None if section.weights is None or found is None else hub_id(section.weights)
    # A part read from an export has another location, and keeps the recorded one.
    return section.model_copy(update={"weights": found}) if hub and str(found).startswith(f"{hub[0]}@") else section
