"""What is planted where data are read: if it runs, it leaves a mark."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any


class Payload:
    """Its pickle makes the folder `mark` when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


def planted(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def works(mark: Path) -> None:
    """The payload itself is not what is wrong with a test that finds no mark."""
    pickle.loads(planted(mark))
    mark.rmdir()


def plant_in_shards(source: Path, mark: Path) -> None:
    """Let the instructions of every sample be a pickle, in shards that are otherwise whole."""
    from streaming.base.format import MDSWriter

    from stamo_dist.data.shards import MappedShard, ShardLayout, ShardSpec

    for index in source.rglob("index.json"):
        entries = json.loads(index.read_text())["shards"]
        old = index.parent.with_suffix(".old")
        index.parent.rename(old)
        names, encodings = entries[0]["column_names"], entries[0]["column_encodings"]
        columns = {n: "pkl" if n == "instruction" else e for n, e in zip(names, encodings, strict=True)}
        with MDSWriter(out=str(index.parent), columns=columns) as writer:
            for entry in entries:
                layout = ShardLayout(tuple(names), tuple(encodings), tuple(s or None for s in entry["column_sizes"]))
                raw = entry["raw_data"]
                shard = MappedShard(ShardSpec(str(old / raw["basename"]), raw["bytes"], entry["samples"], layout, ""))
                for i in range(entry["samples"]):
                    row = {name: bytes(shard.bytes(i, name)) for name in names}
                    writer.write({**row, "instruction": planted(mark)})
        shutil.rmtree(old)
