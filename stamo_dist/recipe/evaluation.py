"""What a recipe says about measuring while it trains."""

from __future__ import annotations

from pydantic import Field

from stamo_dist.recipe.section import NonNegativeInt, PositiveInt, Section


class Evaluate(Section):
    """Small measurements on held-out episodes while a tokenizer trains; they change nothing about the training."""

    every: PositiveInt | None = Field(
        None, description="Steps between them: a multiple of train.checkpoint.every, as saved weights are measured."
    )
    reconstruct: NonNegativeInt = Field(32, description="Frames of each source to reconstruct; 0: none.")
    probe: list[PositiveInt] = Field(
        default_factory=list, description="Frames between the two whose motion a small head reads; empty: no probe."
    )


def evaluate_problems(evaluate: Evaluate, stage: str, checkpoint_every: int) -> list[str]:
    """What does not fit the rest of the recipe."""
    if evaluate.every is None:
        return []
    problems = []
    if stage != "tokenizer":
        problems.append(f"evaluate.every: only a tokenizer is measured while it trains, not the {stage} stage")
    if evaluate.every % checkpoint_every:
        problems.append(
            f"evaluate.every: {evaluate.every} is no multiple of train.checkpoint.every ({checkpoint_every})"
        )
    return problems
