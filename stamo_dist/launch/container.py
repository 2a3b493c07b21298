"""Containers for the processes of a job. The job itself, which asks to be queued again, stays outside of them.

pyxis (with enroot) is a plugin of srun and gets options of srun; Apptainer and Singularity are commands in front of the
interpreter.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stamo_dist.errors import RunError

if TYPE_CHECKING:
    from stamo_dist.launch.record import Launch

KINDS = ("pyxis", "apptainer", "singularity")
PYTHON = "python3"  # of an image, where the profile names none
_PARTS = ",:"  # they separate mounts, and the parts of a mount
#: Options of `apptainer exec` that keep the variables of the job from the processes: their ranks, ports and GPUs.
_HIDE = ("-e", "--cleanenv", "-c", "--contain", "-C", "--containall")
_GPU = ("--nv", "--nvccli", "--rocm")


def problems(container: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a profile's `container`, each beginning with its field."""
    kind, image = container["kind"], container["image"]
    if kind == "pyxis" and image.endswith(".sif"):
        yield f"container.kind: pyxis reads no .sif file, as {image}; write kind: apptainer, or name a .sqsh file"
    if kind != "pyxis" and image.endswith(".sqsh"):
        yield f"container.kind: {image} is enroot's; write kind: pyxis, or name a .sif file"
    if image.startswith(("~", "$")):
        yield f"container.image: no shell expands {image}; write the whole path"
    for mount in container["mounts"]:
        source, _, rest = mount.partition(":")
        target = rest.partition(":")[0] or source
        if not (source.startswith("/") and target.startswith("/")) or "," in mount or mount.count(":") > 2:
            yield (
                f"container.mounts: {mount!r} is not SOURCE:TARGET or SOURCE:TARGET:ro with whole paths; "
                "no shell expands ~ and $HOME, and a path with , or : cannot be mounted"
            )
    for option in container["options"]:
        if not option.startswith("-"):
            yield f"container.options: {option!r} does not begin with -; write option and value as one, --NAME=VALUE"
        elif kind != "pyxis" and option in _HIDE:
            yield f"container.options: {option} hides the job's variables from its processes; leave it out"
        elif re.match(r"--container-(image|mounts|workdir|env)\b|(-B|--bind)\b", option):
            name = option.partition("=")[0]
            yield f"container.options: {name} is made of image, mounts and environment; write it there"


def inside(launch: Launch) -> tuple[list[str], list[str]]:
    """(options of srun, words in front of the interpreter) that put a launch's processes into its profile's container.

    The run folder, the code and the working directory are mounted at their own places.
    """
    container = launch.profile.get("container")
    if not container:
        return [], []
    kind, options = container.get("kind", "pyxis"), container.get("options", [])
    mounts = [f"{path}:{path}" for path in own_folders(launch)]
    mounts += [m if ":" in m else f"{m}:{m}" for m in container.get("mounts", ())]
    if kind == "pyxis":
        flags = [f"--container-image={container['image']}", f"--container-mounts={','.join(mounts)}"]
        flags.append(f"--container-workdir={os.getcwd()}")
        names = ",".join(launch.profile.get("environment", {}))  # before the image's own
        return [*flags, *([f"--container-env={names}"] if names else []), *options], []
    gpus = ["--nv"] if launch.profile.get("gpus_per_node") and not {*_GPU} & {*options} else []
    return [], [kind, "exec", *gpus, *(f"--bind={mount}" for mount in mounts), *options, container["image"]]


def own_folders(launch: Launch) -> list[Path]:
    """The folders that every process needs; of one whose name cannot be mounted, the nearest above that can.

    Raises:
        RunError: There is none.
    """
    found: list[Path] = []
    for path in (Path(launch.run_dir), Path(launch.snapshot or launch.run_dir), Path.cwd()):
        plain = next(p for p in (path, *path.parents) if not {*_PARTS} & {*str(p)})
        if plain == Path(plain.anchor):
            if path == Path.cwd():  # not needed where recipe and profile name whole paths
                continue
            raise RunError(f"run_dir: {path} cannot be mounted into a container because of its , or :; choose another")
        found.append(plain)
    return [p for i, p in enumerate(found) if p not in found[:i] and not {*p.parents} & {*found}]


def exports(profile: Mapping[str, Any]) -> dict[str, str]:
    """The profile's environment, and what makes Apptainer set it in the container in place of the image's."""
    environment = dict(profile.get("environment", {}))
    kind = (profile.get("container") or {}).get("kind", "pyxis")
    if kind == "pyxis" or not environment:
        return environment
    mark = kind.upper()
    inside = {f"{mark}ENV_{name}": value for name, value in environment.items()}
    return {**environment, **inside, f"{mark}_NO_EVAL": "1"}  # else a shell expands $ and ` in the values


def note(container: Mapping[str, Any]) -> Iterator[str]:
    """Whether the image is a file that is not on this machine."""
    image = Path(container["image"])
    if (image.is_absolute() or image.suffix in (".sif", ".sqsh")) and not image.exists():
        yield f"container.image: {image} is not on this machine; the nodes must have it"


def missing(profile: Mapping[str, Any]) -> str:
    """What this node lacks to start the profile's container, and the way out; "" if nothing is known to be missing."""
    kind = (profile.get("container") or {}).get("kind", "pyxis")
    if kind == "pyxis" or shutil.which(kind):
        return ""
    return f"there is no {kind} on {os.uname().nodename}; name the module that brings it under modules in the profile"
