"""Help pages: whole summaries, the commands of `stamo` in groups with an example each, and `stamo --version`."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

import stamo_dist

#: Heading → its commands, and an example.
GROUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "Begin": (("init", "demo", "env", "completion"), "stamo init my_project"),
    "Data": (("data", "mix", "encode", "sync"), "stamo data convert libero raw/libero shards/libero --size 256"),
    "Recipes": (("recipe", "plan"), "stamo recipe check recipes/tokenizer_demo.yaml"),
    "Train": (("train", "submit", "resume", "cancel"), "stamo train recipes/tokenizer_demo.yaml --nproc 2"),
    "Watch": (("status", "runs", "logs", "doctor", "chaos"), "stamo status demo/runs/tokenizer"),
    "Measure": (("eval", "report"), "stamo eval reconstruct demo/runs/tokenizer"),
    "Use": (("export", "serve"), "stamo export demo/runs/tokenizer exports/tokenizer"),
}
_LONGEST = 400  # characters of a summary


class WholeSummaries(TyperGroup):
    """A group of commands whose summaries are wrapped and not cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        self._section(ctx, formatter, "Commands", self.list_commands(ctx))

    def _section(self, ctx: Any, formatter: Any, heading: str, names: Any, example: str = "") -> None:
        commands = [(name, command) for name in names if (command := self.get_command(ctx, name)) is not None]
        rows = [(name, command.get_short_help_str(_LONGEST)) for name, command in commands if not command.hidden]
        if not rows:
            return
        with formatter.section(heading):
            formatter.write_dl(rows)
            if example:
                formatter.write_text(f"Example: {example}")


class Grouped(WholeSummaries):
    """The commands of `stamo` by GROUPS; what is in none comes last."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        for heading, (members, example) in GROUPS.items():
            self._section(ctx, formatter, heading, [name for name in members if name in names], example)
        grouped = {name for members, _ in GROUPS.values() for name in members}
        self._section(ctx, formatter, "Others", [name for name in names if name not in grouped])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Whole, as a path that is wrapped cannot be opened."""
        formatter.write(f"\n{self.epilog}\n")


def show_version(wanted: bool) -> None:
    """Print the versions that a report of a fault needs, and exit."""
    if not wanted:
        return
    from stamo_dist.run.code import code_hash, git_commit

    commit = git_commit()
    print(f"stamo-dist {stamo_dist.__version__}, {f'commit {commit}' if commit else f'code {code_hash()[:12]}'}")
    print(f"torch {_torch()}")
    raise typer.Exit


def _torch() -> str:
    from stamo_dist.run.environment import cuda_of_torch, gpus, versions

    version, cuda = versions(("torch",))["torch"], cuda_of_torch()
    if version is None:
        return "is not installed"
    return f"{version}, CUDA {cuda}, {', '.join(gpus()) or 'no GPU'}" if cuda else f"{version}, built without CUDA"
