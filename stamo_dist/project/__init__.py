"""What `stamo init` writes: a project of one's own, of the files in this folder, the schema and the profiles."""

from __future__ import annotations

import shutil
from pathlib import Path

from stamo_dist import shipped
from stamo_dist.errors import StamoError

_HERE = Path(__file__).parent
#: File of the new project → what it is a copy of.
_OWN = {
    "README.md": _HERE / "README.md",
    ".gitignore": _HERE / "gitignore",
    "recipes/vae.yaml": _HERE / "recipes/vae.yaml",
    "recipes/tokenizer.yaml": _HERE / "recipes/tokenizer.yaml",
    "recipes/schema.json": shipped.RECIPES / "schema.json",
}


def files() -> dict[str, Path]:
    """The new project's files, and what each is a copy of."""
    profiles = sorted(path for path in shipped.PROFILES.iterdir() if path.is_file())
    return {**_OWN, **{f"slurm/{path.name}": path for path in profiles}}


def write_project(folder: Path) -> list[str]:
    """Write the files into `folder`, which may exist; returns those that were there already, and are left as they were.

    Where there is a README.md of another's, ours is STAMO.md.

    Raises:
        StamoError: All of them are there, or the folder cannot be written.
    """
    there = [name for name in files() if (folder / name).exists()]
    if len(there) == len(files()):
        raise StamoError(f"{folder}: is a project already, and nothing was written; its README.md has the commands")
    try:
        for name, source in files().items():
            at = folder / ("STAMO.md" if name == "README.md" and name in there else name)
            if not at.exists():
                at.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, at)
    except OSError as e:
        raise StamoError(f"{folder}: cannot be written: {e.strerror}; name another folder") from e
    return there
