"""What a recipe says of the weights that a run begins with: another run's, or a model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stamo_dist.recipe.section import Section

#: Section of a recipe that may be written as text → its field that has this text.
SHORT_FORMS = {"init_from": "path"}
#: Stage → the parts that a model of it may have.
PARTS = {
    "tokenizer": ("encoder", "compressor", "decoder", "straight"),
    "vae": ("vae",),
    "policy": (
        "vision", "projector", "state_projector", "language", "action_head", "proprio_projector", "world_head",
        "policy",
    ),
}  # fmt: skip
#: Stage → the fields that name what it does not train, by the parts that another stage calls so.
_NAMED = {
    "tokenizer": {"encoder": "model.encoder.weights", "vae": "model.vae.weights"},
    "policy": dict.fromkeys(("encoder", "compressor", "decoder"), "policy.tokenizer"),
}


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

    def check_other(self, run: Path) -> None:
        """Raises: ValueError: The weights are of the run itself that is to begin with them."""
        own, given = run.resolve(), Path(self.path).expanduser().resolve()
        if given == own or own in given.parents:
            raise ValueError(f"{given} is of this run itself; leave it out to go on, or choose another run_dir")


def initial_problems(initial: InitFrom, stage: str) -> list[str]:
    """Parts that no model of the stage has."""
    return [
        f"init_from.parts: {part}: the {stage} stage has {', '.join(PARTS[stage])}{if_frozen(part, stage)}"
        for part in initial.parts or ()
        if part not in PARTS[stage]
    ]


def if_frozen(part: str, stage: str) -> str:
    """The end of a message: the field that names a part that the stage does not train; "" for any other part."""
    named = _NAMED.get(stage, {}).get(part)
    return f"; it is frozen here: name it as {named}" if named else ""


def _section(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


InitialWeights = Annotated[InitFrom | None, BeforeValidator(_section, json_schema_input_type=str | InitFrom | None)]
