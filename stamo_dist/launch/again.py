"""The command by which a run that has ended goes on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from stamo_dist.launch.record import Launch
from stamo_dist.run.history import last_objects


def again(run: Path, launch: Launch | None) -> str:
    """What a person types to have the run go on where it stopped, in backquotes."""
    if launch is None:
        return f"`{command_by_hand(run)}`"
    return (
        f"`stamo resume {shlex.quote(str(run))}`" if launch.kind == "run" else "submitting its pipeline or sweep again"
    )


def command_by_hand(run: Path) -> str:
    """The command of the last start of a run that was started by `stamo train`, from this folder."""
    try:
        about = json.loads((run / "env.json").read_text())
        words, folder = list(map(str, about["command"]))[1:], about.get("cwd")
    except (OSError, ValueError, KeyError, TypeError):
        words, folder = [], None
    if words[:1] != ["train"]:
        return shlex.join(["stamo", "train", str(run / "resolved.yaml")])
    if "--resume" in words:  # it goes on from its own checkpoints now
        at = words.index("--resume")
        del words[at : at + 2]
    processes = next(last_objects(run / "starts.jsonl"), {}).get("processes", 1)
    if processes != 1 and not any(word.startswith("--nproc") for word in words):  # a rank's command, which has none
        words += ["--nproc", str(processes)]
    line = shlex.join(["stamo", *words])
    return line if folder in (None, str(Path.cwd())) else f"cd {shlex.quote(str(folder))} && {line}"
