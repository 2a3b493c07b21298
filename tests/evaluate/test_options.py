"""The commands have the options that the measurements' classes have, with their defaults and limits."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest
import typer

from stamo_dist.cli.app import app
from stamo_dist.evaluate import options

COMMANDS = {
    "reconstruct": options.ReconstructOptions,
    "interpolate": options.InterpolateOptions,
    "probe": options.ProbeOptions,
    "transfer": options.TransferOptions,
    "speed": options.SpeedOptions,
    "actions": options.ActionsOptions,
    "plan": options.PlanOptions,
    "rollout": options.RolloutOptions,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_field_is_an_option(name: str) -> None:
    command = typer.main.get_command(app).commands["eval"].commands[name]  # type: ignore[attr-defined]
    parameters = {parameter.name: parameter for parameter in command.params}
    for field in fields(COMMANDS[name]):
        parameter = parameters.pop(field.name)
        assert parameter.required == (field.default is MISSING)
        assert field.default is MISSING or parameter.default == field.default
        assert parameter.help
    assert parameters.keys() <= {"help"}
    assert command.help == COMMANDS[name].__doc__.replace("\n    ", "\n").strip()  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"greater than or equal|not in the range"):
        command.make_context(
            name, ["x", "--tasks", "t", "--trials", "0"] if name in ("plan", "rollout") else limit(name)
        )


def limit(name: str) -> list[str]:
    return ["x", {"speed": "--calls", "actions": "--frames", "probe": "--seeds"}.get(name, "--steps"), "0"]
