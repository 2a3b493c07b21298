"""A converted source written anew with other samples: real frames and vectors, one thing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stamo_dist import _streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import MDSWriter, reader_from_json

from stamo_dist.data.agreement import describing, prefix_of
from stamo_dist.data.schema import EPISODES, MANIFEST, columns, read_manifest

Samples = list[dict[str, Any]]


def read(source: Path, split: str, camera: str) -> Samples:
    """Every sample, read by mosaicml-streaming."""
    index = json.loads((source / split / camera / "index.json").read_text())
    readers = [reader_from_json(str(source / split), camera, shard) for shard in index["shards"]]
    return [reader[i] for reader in readers for i in range(len(reader))]


def remake(
    source: Path, out: Path, change: Callable[[Samples], Samples], *, splits: tuple[str, ...] = ("train",),
    shard_bytes: int = 1 << 26, **manifest_changes: Any,
) -> Path:  # fmt: skip
    """Copy `source` to `out` with the samples of each camera of `splits` changed; checksums and counts fit again."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(".*"))
    manifest = read_manifest(source)
    dims = {"action": manifest.action_dim, "original_action": manifest.original_action_dim}
    for split in splits:
        for camera in manifest.cameras:
            samples = change(read(source, split, camera))
            folder = out / split / camera
            shutil.rmtree(folder)
            names = columns(**dims, proprio=manifest.proprio_dim)
            with MDSWriter(out=str(folder), columns=names, hashes=["sha256"], size_limit=shard_bytes) as writer:
                for sample in samples:
                    writer.write(sample)
        frames = len(samples)
        manifest.splits[split] = manifest.splits[split].model_copy(update={"frames": frames})
    sums = {}
    for path in sorted(out.rglob("*.mds")):
        sums[path.relative_to(out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    described = [name for split in manifest.splits for name in describing(split, manifest.cameras)]
    prefixes = {name: prefix_of((out / name).read_bytes(), name) for name in described}
    changed = manifest.model_copy(update={"checksums": sums, "prefixes": prefixes, **manifest_changes})
    (out / MANIFEST).write_text(changed.model_dump_json(indent=2) + "\n")
    return out


def table(source: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (source / split / EPISODES).read_text().splitlines()]
