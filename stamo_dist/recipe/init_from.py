"""What a recipe says of the weights that a run begins with: another run's, or a model's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stamo_dist.recipe.section import Section


class InitFrom(Section):
    """Weights to begin with, of another run or a model; optimizer, schedule and step begin anew. Or just its path."""

    path: str = Field(description="Run (its newest whole checkpoint), checkpoint, export (RUN/model) or hub id.")
    parts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Which parts, such as encoder or decoder; null: all that both have."
    )
    weights: Literal["averaged", "raw"] | None = Field(
        None, description="The moving average of the parent's weights or the weights; null: the average, if it has one."
    )
    resize: list[Literal["positions", "tokens"]] = Field(
        default_factory=list,
        description="What may have another shape: positions (another image size), tokens (of the state).",
    )


def _section(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


InitialWeights = Annotated[InitFrom | None, BeforeValidator(_section, json_schema_input_type=str | InitFrom | None)]
