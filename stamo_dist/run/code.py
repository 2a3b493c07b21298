"""Which code a process runs: the commit of its own repository, the hash of what is installed, packages' versions."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import stamo_dist
from stamo_dist import shipped

#: File beside a copied package with its commit, as the copy may be inside a checkout at a later commit.
COMMIT_FILE = "GIT_COMMIT"
_TIMEOUT = 30.0  # seconds, of git


def code_version() -> str:
    """The commit as `git_commit`; where there is none, version and hash of the installed code."""
    return git_commit() or f"{stamo_dist.__version__}, code {code_hash()[:12]}"


def git_commit() -> str | None:
    """Commit of the package's own repository, with `+` when it has uncommitted changes; None outside of it."""
    copied = shipped.ROOT / COMMIT_FILE
    if copied.is_file():
        return copied.read_text().strip() or None
    root = _repository()
    if root is None:
        return None
    commit, dirty = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or dirty is None:
        return None
    return commit.decode().strip() + ("+" if dirty.strip() else "")


def git_diff() -> bytes:
    """Uncommitted changes of the package's own repository."""
    root = _repository()
    return (_git(root, "diff", "HEAD") or b"") if root is not None else b""


@cache
def code_hash() -> str:
    """SHA-256 of the package's modules and their names; the same of a checkout, of a wheel and of a copy."""
    digest = hashlib.sha256()
    for package, folder in shipped.PACKAGES.items():
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            name = path.relative_to(folder)
            if name.parts[0] != shipped.FOLDER:
                content = path.read_bytes()
                digest.update(f"{package}/{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Package → installed version; None without one."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _repository() -> Path | None:
    """Root of the repository that the package is developed in.

    A wheel may lie inside a repository of the user's, whose commit and changes are none of the package's.
    """
    root = Path(stamo_dist.__file__).resolve().parents[1]
    if shipped.IS_WHEEL or not (root / "setup.cfg").is_file() or "name = stamo-dist\n" not in _text(root / "setup.cfg"):
        return None
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top.rstrip(b"\n"))).resolve() != root:
        return None
    tracked = _git(root, "ls-files", "--error-unmatch", "stamo_dist/__init__.py", "setup.cfg")
    return None if tracked is None else root


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints; None where it fails or is not there. GIT_DIR and the like are those of another repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, check=True, timeout=_TIMEOUT, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
