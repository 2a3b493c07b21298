"""The frozen StaMo tokenizer beside a policy: what it sees through, and what it learns to predict."""

from __future__ import annotations

from torch import Tensor

from stamo_dist.data.loader import Batch
from stamo_dist.data.mixture import Mixture
from stamo_dist.models.openvla.stamo import EncodedFrames, Reads, StamoVision, Target
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.recipe.schema import Recipe


def open_state_encoder(recipe: Recipe, mixture: Mixture) -> tuple[StamoVision | None, str | None]:
    """The half of the tokenizer that sees, where it is read, and the whole tokenizer's fingerprint.

    Raises:
        CheckpointError: There is no such tokenizer.
        DataError: `targets: cached` asks for states that are not there, or not of this tokenizer and these shards.
    """
    cfg = recipe.policy
    cached = cfg.targets == "cached"
    if cfg.tokenizer is None or (cfg.world is None and cfg.vision != "stamo" and not cached):
        return None, None
    tokenizer = StateEncoder.from_pretrained(cfg.tokenizer)
    if cached:
        mixture.find_cache("states", tokenizer.fingerprint)
    return StamoVision(tokenizer), tokenizer.fingerprint


def sources_of(state_encoder: StamoVision | None) -> dict[str, str]:
    """Where a policy's frozen encoder was found, by recipe field."""
    report = None if state_encoder is None else state_encoder.tokenizer.encoder.report
    return {} if report is None else {"policy.tokenizer": report.source}


def encode(batch: Batch, state_encoder: StamoVision, reads: Reads) -> EncodedFrames:
    """The frames at t of all views, view by view; the cache spares the encoder where their states suffice."""
    if batch.state is not None and reads == "states" and batch.views is None:
        return EncodedFrames(None, batch.state)
    return state_encoder.encode(batch.cameras().flatten(0, 1))


def target_of(
    batch: Batch, state_encoder: StamoVision | None, target: Target, now: EncodedFrames | None = None
) -> Tensor:
    """What the frames at t + ahead give the policy to predict, (b, tokens, dim) float32: cached, or computed now.

    `now`: the frames at t, where they were encoded before.
    """
    if batch.target_state is not None:
        assert batch.state is not None, "they come together"
        return batch.target_state if target == "state" else batch.target_state - batch.state
    assert state_encoder is not None, "without a cache there is a tokenizer"
    assert batch.target is not None, "without a cache the target frames are read"
    if target == "motion" and now is None:
        now = state_encoder.encode(batch.images)
    return state_encoder.encode(batch.target).target(now, target)
