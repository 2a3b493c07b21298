"""Locating a checkpoint: a folder, a file, or a revision of a hub repository."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stamo_dist.errors import CheckpointError
from stamo_dist.pretrained.checksums import CHECKSUMS
from stamo_dist.pretrained.files import PICKLED, STEMS, VARIANTS, file_name, index_name

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_CACHED = re.compile(r"/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")
_FILES = (".safetensors", *PICKLED)
#: The files of an exported model.
EXPORTED = ("*.json", "*.safetensors", "*--*_checkpoint.pt", "*.model", CHECKSUMS)
#: Of these, what says which model it is: the first that is there.
ABOUT = ("stamo.json", "policy.json", "config.json", "adapter_config.json")


def hub_id(weights: str) -> tuple[str, str | None] | None:
    """(OWNER/NAME, revision) of a recipe's `weights`; None if they are not a hub id, or are local.

    runs/NAME is local, there or not: a run folder where recipes put it.
    """
    match = _HUB_ID.fullmatch(weights)
    if match is None or weights.startswith("runs/") or Path(weights).expanduser().exists():
        return None
    return match["repo"], match["revision"]


def meant(given: str) -> str:
    """' (did you mean PATH?)' where a hub id may be a mistyped path: folders here have nearly its names; else ""."""
    path = Path(given.partition("@")[0])
    first, *others = path.parts
    near = _closest(first, Path(), cutoff=0.75)
    if near is None:
        return ""
    for name in others:
        near /= (_closest(name, near, cutoff=0.6) or Path(name)).name
    return "" if near == path else f" (did you mean {near}?)"


def _closest(name: str, folder: Path, cutoff: float) -> Path | None:
    """The folder in another whose name is most like this one."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        names = []
    return next((folder / close for close in get_close_matches(name, names, n=1, cutoff=cutoff)), None)


def source(path: Path) -> str:
    """The recorded location of a checkpoint: OWNER/NAME@COMMIT if it is in the hub's cache, else its path."""
    match = _CACHED.search(path.as_posix())
    return f"{match['owner']}/{match['name']}@{match['commit']}" if match else str(path)


def locate(
    weights: str, subfolders: Sequence[str], field: str, extra: Sequence[str] = (), alone: str | None = None
) -> Path:
    """Find the checkpoint `weights`, downloading it if needed: the folder with config.json, or a single file.

    `weights` is a local folder or file or a hub id, OWNER/NAME or OWNER/NAME@REVISION; `subfolders` are tried in order
    ("" is the root). `field` is the recipe field that an error names. Hub files come from the local cache or are
    downloaded, no more of them than needed; `extra` are patterns of further files. `alone` is a file that a
    repository may have instead of config.json and weights: an adapter's.

    Raises:
        CheckpointError: it does not exist, none of the subfolders exists, or the hub could not be reached.
    """
    hub = hub_id(weights)
    return on_disk(weights, subfolders, field) if hub is None else _from_hub(*hub, subfolders, field, extra, alone)


def from_hub(given: str, mark: str, field: str) -> Path | None:
    """The folder of an exported model, by its hub id: downloaded whole if its repository has the file `mark`.

    None if `given` is not a hub id, or its repository has no such file.

    Raises:
        CheckpointError: the hub could not be reached, or has no such repository.
    """
    hub = hub_id(given)
    if hub is None:
        return None
    repo, revision = hub
    try:
        root = snapshot(repo, revision, [mark])
        if not (root / mark).is_file():
            return None
        return snapshot(repo, root.name, list(EXPORTED))
    except hub_failures() as error:
        raise not_supplied(repo, revision, field, error) from error


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete policy, not just an adapter."""
    try:
        return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    except OSError:  # an adapter's name for its base may be any text
        return False


def named_base(adapter: Path, config: Mapping[str, Any]) -> str:
    """The base of an adapter: a folder with weights if it is one, else a possible hub id.

    A path is relative to the adapter's folder, else to the working directory.

    Raises:
        CheckpointError: It names no base, and the folder above it has no weights.
    """
    named = str(config.get("base_model_name_or_path") or "")
    above = adapter.absolute().parent
    if not named:
        if has_weights(above):
            return str(above)
        raise CheckpointError(
            f"policy.weights: {adapter} is an adapter that names no base; set base_model_name_or_path in its "
            "adapter_config.json to a folder or a hub id"
        )
    if (revision := config.get("revision")) and hub_id(named) == (named, None):
        named = f"{named}@{revision}"
    return next((str(p) for p in (adapter / named, Path(named).expanduser()) if has_weights(p)), named)


def on_disk(weights: str, subfolders: Sequence[str], field: str) -> Path:
    """As `locate`, for local checkpoints outside the hub's cache."""
    root = Path(weights).expanduser()
    for sub in subfolders:
        if (root / sub / "config.json").is_file():
            return root / sub
    if root.is_file():
        if root.suffix not in _FILES:
            raise CheckpointError(f"{field}: {weights} is no folder, nor a file {' or '.join(_FILES)}; convert it")
        return root
    if not root.exists():
        raise CheckpointError(
            f"{field}: there is no folder {weights}; {'train that run first, or ' * ('runs' in root.parts)}give an "
            "existing folder or file, or a hub id (owner/name or owner/name@revision)"
        )
    raise CheckpointError(f"{field}: there is no {_names(subfolders)} in {weights}; {_instead(root, field)}")


def _instead(root: Path, field: str) -> str:
    if (root / "resolved.yaml").is_file():
        return "that run has not finished and exported its model"
    files = sorted(p.name for p in root.iterdir() if p.suffix in _FILES)
    if files:
        return f"if you mean {files[0]}, set {field}: {root / files[0]}"
    if field.startswith("policy."):
        return "give a folder of OpenVLA or OpenVLA-OFT, of a PEFT adapter, or RUN/model"
    return "give a folder in the layout of diffusers' or transformers' save_pretrained"


def _names(subfolders: Sequence[str]) -> str:
    return " or ".join(f"{sub}/config.json" if sub else "config.json" for sub in subfolders)


def _from_hub(
    repo: str, revision: str | None, subfolders: Sequence[str], field: str, extra: Sequence[str], alone: str | None
) -> Path:
    named = repo + (f"@{revision}" if revision else "")
    try:
        for prefix in [f"{sub}/" if sub else "" for sub in subfolders]:
            root = snapshot(repo, revision, [f"{prefix}config.json"])
            if not (root / prefix / "config.json").is_file():
                continue
            # Each commit has its own folder in the cache: take all files from this one, even if the branch moves now.
            for variant in VARIANTS:
                patterns = [f"{prefix}{pattern}" for pattern in _patterns(variant)]
                snapshot(repo, root.name, [*patterns, *extra])
                if any(next((root / prefix).glob(pattern), None) for pattern in _patterns(variant)):
                    break
            return root / prefix
        if alone is not None:
            root = snapshot(repo, revision, [alone])
            if (root / alone).is_file():
                return snapshot(repo, root.name, [alone, *extra])
    except hub_failures() as error:
        raise not_supplied(repo, revision, field, error) from error
    raise CheckpointError(
        f"{field}: there is no {_names(subfolders)} in {named} on the hub; give a repository in the layout of "
        "diffusers or transformers (Stable Diffusion 3: stabilityai/stable-diffusion-3-medium-diffusers), or download "
        f"its single file and set {field}: FILE.safetensors"
    )


def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a repository's commit in the hub's cache, with the files of these patterns, downloaded if needed.

    Raises:
        one of `hub_failures`: the hub could not be reached, or has no such repository or revision.
    """
    from huggingface_hub import constants, snapshot_download

    # huggingface_hub 1 asks the hub which files a commit has, even offline, unless it is told that the cache is all.
    offline = constants.HF_HUB_OFFLINE
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))


def hub_failures() -> tuple[type[Exception], ...]:
    """What `snapshot` raises."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        from httpx import HTTPError  # huggingface_hub 1; before, requests' errors are OSErrors
    except ImportError:
        return HfHubHTTPError, OSError, ValueError
    return HTTPError, HfHubHTTPError, OSError, ValueError


def not_supplied(repo: str, revision: str | None, field: str, error: Exception) -> CheckpointError:
    """The error to raise where `snapshot` failed."""
    named = repo + (f"@{revision}" if revision else "")
    why = (str(error).strip().splitlines() or [""])[-1]
    return CheckpointError(
        f"{field}: there is no folder {named}{meant(repo)}, and the hub did not supply it ({type(error).__name__}: "
        f"{why}). On a machine with network (and, for gated models, after `hf auth login`) run "
        f"`{download(repo, revision)} --local-dir DIR` and set {field}: DIR"
    )


def _patterns(variant: str) -> list[str]:
    """Patterns of weight files in a hub folder."""
    of_variant = f".{variant}" if variant else ""
    found = [name(stem, variant) for stem in STEMS for name in (index_name, file_name)]
    # Both orders of shard number and variant occur.
    found += [f"{stem}{of_variant}-?????-of-?????.safetensors" for stem in STEMS]
    return found + [f"{stem}-?????-of-?????{of_variant}.safetensors" for stem in STEMS if variant]


def download(repo: str, revision: str | None) -> str:
    """The command that downloads it into the cache."""
    return f"hf download {repo}" + (f" --revision {revision}" if revision else "")


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the hub's client asks nobody, in a process with these environment variables."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cached(
    repo: str,
    revision: str | None,
    subfolders: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    name: str = "config.json",
) -> Path | None:
    """The folder with the file `name` of a repository in the hub's cache, as a process with these environment variables
    finds it; None if it is not there.

    A repository folder without files (from a failed download, or one made elsewhere) counts as missing.
    """
    caches = Path(environ.get("XDG_CACHE_HOME") or "~/.cache")
    hub = Path(
        environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or caches / "huggingface") / "hub"
    ).expanduser()
    folder = hub / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if not commit:
        return None
    root = folder / "snapshots" / commit
    return next((root / sub for sub in subfolders if (root / sub / name).is_file()), None)
