"""The frozen StaMo tokenizer of a policy: encoding its input and the targets of its world head."""

from __future__ import annotations

from torch import Tensor

from stamo_dist.data.loader import Batch
from stamo_dist.data.mixture import Mixture
from stamo_dist.models.openvla.stamo import EncodedFrames, Reads, StamoVision, Target
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.recipe.schema import Recipe


def open_state_encoder(recipe: Recipe, mixture: Mixture) -> tuple[StamoVision | None, str | None]:
    """The tokenizer's encoder half, if it is used, and the tokenizer's fingerprint.

    Raises:
        CheckpointError: There is no such tokenizer.
        DataError: `targets: cached` needs states that are missing or of another tokenizer or other shards.
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
    """Recipe field → location of a policy's frozen encoder."""
    report = None if state_encoder is None else state_encoder.tokenizer.encoder.report
    return {} if report is None else {"policy.tokenizer": report.source}


def encode(batch: Batch, state_encoder: StamoVision, reads: Reads) -> EncodedFrames:
    """Encode the frames at t of all views, view by view; cached states are used if they suffice."""
    if batch.state is not None and reads == "states" and batch.views is None:
        return EncodedFrames(None, batch.state)
    return state_encoder.encode(batch.cameras().flatten(0, 1))


def target_of(
    batch: Batch, state_encoder: StamoVision | None, target: Target, now: EncodedFrames | None = None
) -> Tensor:
    """The world head's target from the frames at t + ahead, (b, tokens, dim) float32: cached, or computed now.

    `now`: the encoded frames at t, if available.
    """
    if batch.target_state is not None:
        assert batch.state is not None, "they come together"
        return batch.target_state if target == "state" else batch.target_state - batch.state
    assert state_encoder is not None, "without a cache there is a tokenizer"
    assert batch.target is not None, "without a cache the target frames are read"
    if target == "motion" and now is None:
        now = state_encoder.encode(batch.images)
    return state_encoder.encode(batch.target).target(now, target)
