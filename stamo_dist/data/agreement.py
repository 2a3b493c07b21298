"""Whether what describes the shards, index.json and episodes.jsonl, is what the manifest was written with.

Both files only grow: the manifest has a checksum of the bytes that it counts; who reads by an older one reads no more.
Free of numpy, torch and streaming.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stamo_dist.data.schema import EPISODES, REPAIR, Manifest, Prefix
from stamo_dist.errors import DataError

INDEX = "index.json"


def prefix_of(content: bytes, name: str) -> Prefix:
    """What the manifest says of a file: all of a table, of an index its entries, after which further ones may come."""
    end = content.rindex(b"]") if name.endswith(INDEX) else len(content)
    return Prefix(nbytes=end, sha256=hashlib.sha256(content[:end]).hexdigest())


def describing(split: str, cameras: Iterable[str]) -> list[str]:
    """Names of the files that describe these cameras of a split."""
    return [f"{split}/{EPISODES}", *(f"{split}/{camera}/{INDEX}" for camera in cameras)]


def altered(content: bytes, name: str, manifest: Manifest) -> str:
    """Why a describing file is not that of the manifest; "" if it is, or if the manifest has no checksum of it."""
    expected = manifest.prefixes.get(name)
    if expected is None:
        return ""
    if len(content) < expected.nbytes:
        return f"has {len(content)} bytes, the manifest was written with at least {expected.nbytes}"
    if hashlib.sha256(content[: expected.nbytes]).hexdigest() != expected.sha256:
        return "was changed since the manifest was written: its checksum is another"
    return ""


def check_content(content: bytes, name: str, manifest: Manifest, where: str) -> None:
    """Raises: DataError: As `altered`; `where` names the file."""
    if problem := altered(content, name, manifest):
        raise DataError(f"{where}: {problem}; {REPAIR}")


def check_shards(
    entries: Sequence[Mapping[str, Any]],
    manifest: Manifest,
    split: str,
    camera: str,
    where: str,
    *,
    grown: bool = False,
) -> None:
    """Check the entries of an index that the manifest counts.

    Raises:
        DataError: They count other frames, or as `disagreements`; `where` names the index.
    """
    frames, expected = sum(entry["samples"] for entry in entries), manifest.splits[split].frames
    problems = [f"counts {frames} frames, the manifest {expected}"] if frames != expected else []
    problems += disagreements(_shards(entries), manifest, split, camera, grown=grown)
    if problems:
        raise DataError("\n".join(f"{where}: {problem}; {REPAIR}" for problem in problems))


def _shards(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(file name, sha256 or "") of each."""
    for entry in entries:
        raw = entry["raw_data"]
        yield raw["basename"], (raw.get("hashes") or {}).get("sha256", "")


def disagreements(
    shards: Iterable[tuple[str, str]], manifest: Manifest, split: str, camera: str, *, grown: bool = False
) -> list[str]:
    """Where the shards that an index names are not those of the manifest.

    Args:
        shards: (file name, sha256 or "") of each.
        manifest: Without checksums it says nothing of shards.
        split, camera: Whose index it is.
        grown: The manifest lists further shards, of a later growth.
    """
    found = list(shards)
    problems = []
    if twice := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        problems.append(f"names a shard twice: {twice[0]}")
    if not manifest.checksums:
        return problems
    prefix = f"{split}/{camera}/"
    named = {f"{prefix}{name}": sha256 for name, sha256 in found}
    listed = manifest.checksums
    if unlisted := sorted(name for name in named if name not in listed):
        problems.append(f"lists {_bare(unlisted)}, which the manifest does not")
    if not grown and (unnamed := sorted(n for n in listed if n.startswith(prefix) and n not in named)):
        problems.append(f"the manifest lists {_bare(unnamed)}, which it does not")
    other = [name for name, sha256 in named.items() if sha256 and listed.get(name, sha256) != sha256]
    if other:
        problems.append(f"says another sha256 of {_bare(other)} than the manifest")
    return problems


def _bare(names: list[str]) -> str:
    rest = len(names) - 1
    return names[0].rpartition("/")[2] + (f" and {rest} more" if rest else "")
