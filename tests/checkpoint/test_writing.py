"""How a checkpoint gets to the disk: whole and hashed, early, and without asking the other ranks twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash

from stamo_dist.checkpoint import dcp_writer, sink
from stamo_dist.checkpoint.dcp_writer import DcpWriter, Layout
from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.sink import Sink
from stamo_dist.distributed.dcp import Piece, read_dcp, read_ranges

MIB = 1 << 20


@pytest.mark.parametrize("early", [True, False])
def test_a_file_is_what_was_written_and_knows_its_hash(tmp_path, monkeypatch, early):
    asked = []
    real = sink._sync_file_range
    if early and real is None:
        pytest.skip("the kernel cannot be asked to write back early here")
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


def test_torch_save_computes_no_crc_but_for_the_sink(tmp_path):
    state = {"w": torch.arange(1000)}
    stored = sink.save(state, tmp_path / "w.pt")
    assert stored.bytes == (tmp_path / "w.pt").stat().st_size
    assert torch.equal(torch.load(tmp_path / "w.pt", mmap=True)["w"], state["w"])
    assert torch.serialization.get_crc32_options()
    with pytest.raises(AttributeError):
        sink.save({"f": lambda: None}, tmp_path / "f.pt")
    assert torch.serialization.get_crc32_options()


def test_a_full_disk_is_said_at_the_end(tmp_path):
    """Torch's writers must not see the error: they end the process."""
    file = Sink(Path("/dev/full"))
    assert file.write(bytes(9 * MIB)) == 9 * MIB
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        file.finish()


def save(folder: Path, state: dict, layout: Layout) -> dict[str, Stored]:
    files: dict[str, Stored] = {}
    writer = DcpWriter("dcp", state, None, layout)
    folder.mkdir()
    writer.finish(folder, files, [writer.write(folder, files)])
    return files


def test_a_second_save_of_the_same_layout_gathers_nothing(tmp_path, monkeypatch):
    layout, sent = Layout(), []
    monkeypatch.setattr(dcp_writer, "gather", lambda plan: sent.append(plan) or [plan])
    for step in range(3):
        files = save(tmp_path / str(step), {"module": {"w": torch.full((9,), float(step))}, "lr": step / 7}, layout)
        assert len(sent) == 1
        assert read_dcp(tmp_path / str(step) / "dcp", "module")["w"].tolist() == [float(step)] * 9
        assert set(files) == {"dcp/.metadata", "dcp/__0_0.distcp"}
    save(tmp_path / "3", {"module": {"w": torch.zeros(9), "v": torch.ones(2)}, "lr": 0.0}, layout)
    assert len(sent) == 2
    assert read_dcp(tmp_path / "3/dcp", "module")["v"].tolist() == [1.0, 1.0]


def test_what_lies_elsewhere_than_before_is_found(tmp_path):
    """The same plan, but a value that is no tensor takes more room."""
    layout = Layout()
    for step, text in enumerate(["a", "a" * 5000, "b"]):
        save(tmp_path / str(step), {"text": text, "module": {"w": torch.full((9,), float(step))}}, layout)
        assert read_dcp(tmp_path / str(step) / "dcp", "module")["w"].tolist() == [float(step)] * 9


def test_pieces_of_flattened_tensors_are_read_in_other_pieces(tmp_path):
    whole = torch.arange(10.0)
    save(tmp_path / "saved", {"ema": {"w": Piece(whole, 0, 10), "v": Piece(-whole[:4], 0, 4)}}, Layout())
    assert read_dcp(tmp_path / "saved/dcp", "ema")["w"].tolist() == whole.tolist()
    found = read_ranges(tmp_path / "saved/dcp", {"ema.w": (3, 5), "ema.v": (1, 2)})
    assert {name: t.tolist() for name, t in found.items()} == {
        "ema.w": [3.0, 4.0, 5.0, 6.0, 7.0],
        "ema.v": [-1.0, -2.0],
    }
    save(tmp_path / "rows", {"ema": {"w": whole.view(5, 2)}}, Layout())  # as earlier versions wrote it
    assert read_ranges(tmp_path / "rows/dcp", {"ema.w": (3, 4)})["ema.w"].tolist() == [3.0, 4.0, 5.0, 6.0]
