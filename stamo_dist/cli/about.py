"""`stamo env | completion`: what a report of a fault needs, and completion for shells."""

from __future__ import annotations

import json
from typing import Annotated

import typer

SHELLS = ("bash", "zsh", "fish")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print it for programs.")] = False) -> None:
    """Print what a report of a fault needs: versions, commit, Python, system, devices, Slurm.

    No user, host or path, and of environment variables the names alone.

    Example: stamo env
    """
    from stamo_dist.run.environment import described

    found = described()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:{width}}  {', '.join(value) or 'none' if isinstance(value, list) else value or 'none'}")


def completion(shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell.")]) -> None:
    """Print the script with which a shell completes commands and options of `stamo`.

    bash: `eval "$(stamo completion bash)"` in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit; fish:
    `stamo completion fish > ~/.config/fish/completions/stamo.fish`.

    Example: stamo completion bash
    """
    from typer.completion import get_completion_script

    if shell not in SHELLS:
        raise typer.BadParameter(f"{shell}: there is completion for {', '.join(SHELLS)}")
    script = get_completion_script(prog_name="stamo", complete_var=COMPLETE, shell=shell)
    if shell == "bash":  # the value of --set follows its field at once
        script = script.replace("return 0", "[[ $COMPREPLY == *= ]] && compopt -o nospace 2>/dev/null\n    return 0")
    typer.echo(script)


#: The variable with which a shell asks `stamo` for completions, as typer names it.
COMPLETE = "_STAMO_COMPLETE"
