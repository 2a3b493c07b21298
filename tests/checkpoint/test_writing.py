"""How a checkpoint gets to the disk: whole and hashed, early, and without asking the other ranks twice."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open

from stamo_dist.checkpoint import sink, state_writer
from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.sink import Sink
from stamo_dist.checkpoint.source import StateSource
from stamo_dist.checkpoint.state_writer import STATE, Layout, StateWriter
from stamo_dist.distributed.ranges import WEIGHT, Range, own
from stamo_dist.distributed.rank import World
from stamo_dist.errors import CheckpointError

MIB = 1 << 20


@pytest.mark.parametrize("early", [True, False])
def test_a_file_is_what_was_written_and_knows_its_hash(tmp_path, monkeypatch, early):
    asked = []
    real = sink._sync_file_range
    if early and real is None:
        pytest.skip("needs sync_file_range: Linux with glibc")
    monkeypatch.setattr(sink, "_sync_file_range", (lambda *at: asked.append(at[1:3]) or real(*at)) if early else None)
    file, parts = Sink(tmp_path / "file"), [b"a", bytes(range(256)) * 80_000, b"b" * 100, b"c" * 5 * MIB]
    for part in parts:
        assert file.write(part) == len(part)
    stored, content = file.finish(), (tmp_path / "file").read_bytes()
    assert content == b"".join(parts)
    assert stored == Stored(len(content), f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}")
    if early:
        assert asked[0][0] == 0
        assert all(size >= 8 * MIB for _, size in asked)
        assert sum(size for _, size in asked) > len(content) - 12 * MIB


def test_a_full_disk_is_said_at_the_end(tmp_path):
    """Torch's writers must not see the error: they end the process."""
    file = Sink(Path("/dev/full"))
    assert file.write(bytes(9 * MIB)) == 9 * MIB
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        file.finish()


def save(folder: Path, held: list[Range], shapes: dict[str, tuple[int, ...]], layout: Layout) -> dict[str, Stored]:
    files: dict[str, Stored] = {}
    writer = StateWriter(World(0, 1, 0, 1), held, shapes, {}, None, layout)
    folder.mkdir()
    writer.write(folder, files)
    writer.finish(folder, files)
    return files


def test_a_second_save_of_the_same_layout_gathers_nothing(tmp_path, monkeypatch):
    layout, sent = Layout(), []
    monkeypatch.setattr(state_writer, "gather", lambda rows: sent.append(rows) or [rows])
    for step in range(3):
        files = save(
            tmp_path / str(step), [Range("w", 0, 9, {WEIGHT: torch.full((9,), float(step))})], {"w": (9,)}, layout
        )
        assert len(sent) == 1
        assert StateSource(tmp_path / str(step) / STATE).whole(WEIGHT)["w"].tolist() == [float(step)] * 9
        assert set(files) == {"state/00000.safetensors", "state/index.json", "state/pieces.npy"}
    held = [Range("w", 0, 9, {WEIGHT: torch.zeros(9)}), Range("v", 0, 2, {WEIGHT: torch.ones(2)})]
    save(tmp_path / "3", held, {"w": (9,), "v": (2,)}, layout)
    assert len(sent) == 2
    assert StateSource(tmp_path / "3" / STATE).whole(WEIGHT)["v"].tolist() == [1.0, 1.0]


def test_any_range_of_any_dtype_is_read_into_any_tensor(tmp_path):
    """Bytes, halves and doubles side by side; into other dtypes, other orders, and where there are no moments."""
    whole = {
        "half": torch.randn(7, 3).to(torch.bfloat16), "byte": torch.arange(5, dtype=torch.uint8),
        "double": torch.randn(4, dtype=torch.float64), "scalar": torch.tensor(3), "flag": torch.tensor([True, False]),
        "image": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in whole.items()}
    held = [Range(name, 0, t.numel(), {WEIGHT: t}) for name, t in whole.items()]
    save(tmp_path / "saved", held, shapes, Layout())
    source = StateSource(tmp_path / "saved" / STATE)
    found = source.whole(WEIGHT)
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in whole.items())
    with safe_open(tmp_path / "saved/state/00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight.half@0"), whole["half"].flatten())
        assert set(file.keys()) == {f"weight.{name}@0" for name in whole}
    wider, image, moment = torch.zeros(10), torch.empty_like(whole["image"]), torch.ones(7, 3)
    source.fill([
        Range("half", 4, 6, {WEIGHT: wider}, offset=3),
        Range("image", 0, image.numel(), {WEIGHT: image}),
        Range("half", 0, 21, {"exp_avg": moment}),
    ])  # fmt: skip
    assert wider.tolist() == [0, 0, 0, *whole["half"].flatten()[4:10].tolist(), 0]
    assert torch.equal(image, whole["image"])
    assert not moment.any()
    for part in (WEIGHT, "ema"):
        with pytest.raises(KeyError, match=rf"the checkpoint lacks {part}\.other"):
            source.fill([Range("other", 0, 2, {part: torch.ones(2)})])


def test_an_index_that_is_none_is_said(tmp_path):
    save(tmp_path / "saved", [Range("w", 0, 9, {WEIGHT: torch.zeros(9)})], {"w": (9,)}, Layout())
    state = tmp_path / "saved" / STATE
    (state / "pieces.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match=r"index\.json and pieces\.npy are not what this version writes"):
        StateSource(state)


def test_every_element_is_of_one_process():
    """Whatever several processes hold alike is cut into equal shares, in the order in which they hold it."""
    held = [[
        Range("a", 0, 5, {WEIGHT: torch.arange(5.0)}, replica=(rank, 3)),
        Range("shard", 4 * rank, 4, {WEIGHT: torch.ones(4)}),
        Range("b", 0, 1, {WEIGHT: torch.ones(())}, replica=(rank, 3)),
        Range("c", 10, 4, {WEIGHT: torch.arange(8.0)}, offset=3, replica=(rank, 3)),
    ] for rank in range(3)]  # fmt: skip
    parts = [[(r.name, r.start, r.flat(WEIGHT).tolist()) for r in own(some)] for some in held]
    assert parts == [
        [("a", 0, [0, 1, 2, 3]), ("shard", 0, [1] * 4)],
        [("a", 4, [4]), ("shard", 4, [1] * 4), ("b", 0, [1]), ("c", 10, [3, 4])],
        [("shard", 8, [1] * 4), ("c", 12, [5, 6])],
    ]
