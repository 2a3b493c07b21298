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


def write_project(folder: Path) -> None:
    """Write the files into `folder`, which may exist.

    Raises:
        StamoError: One of them is there already, or the folder cannot be written.
    """
    if there := [name for name in files() if (folder / name).exists()]:
        raise StamoError(f"{folder}: has {', '.join(there)} already; name another folder")
    try:
        for name, source in files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    except OSError as e:
        raise StamoError(f"{folder}: cannot be written: {e.strerror}; name another folder") from e
