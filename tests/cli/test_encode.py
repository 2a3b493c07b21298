"""Cached latents train like online ones, and a missing or stale cache is refused."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from toy import write_recipe

from stamo_dist import device
from stamo_dist.data.shards import MappedShard
from stamo_dist.distributed.rank import World
from stamo_dist.encode import flow, run
from stamo_dist.encode.run import encode
from stamo_dist.errors import DataError
from stamo_dist.recipe.load import load

STEPS = ("--set", "train.steps=4", "--set", "data.augment.brightness=0")


@pytest.fixture
def own(toy, tmp_path) -> SimpleNamespace:
    """The toy sources, copied, because the cache is written beside them."""
    shutil.copytree(toy.shards, tmp_path / "shards")
    return SimpleNamespace(recipe=write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae), root=tmp_path)


def test_a_gpu_encodes_in_bf16_from_page_locked_memory(own, monkeypatch):
    recipe, gpu, found = load(own.recipe).recipe, FakeGpu(), []
    monkeypatch.setattr(gpu, "allow_tf32", lambda allowed: None)  # it is the whole process's
    for on in (device.CPU, gpu):
        monkeypatch.setattr(device, "_current", on)
        shards = encode(recipe, World(0, 1, 0, 1)).shards
        files = sorted((own.root / "shards").rglob("latents-*/*.npy"))
        assert len(files) == shards > 0
        bits = np.concatenate([np.load(file) for file in files]).view(np.int16)
        found.append(torch.from_numpy(bits).view(torch.bfloat16).float())
        for file in files:
            shutil.rmtree(file.parent, ignore_errors=True)
    assert gpu.cuda.selected == [0, 0], "the thread that reads, too"
    assert gpu.cuda.said["pin"] >= 2 * shards, "each batch of frames, and of rows"
    assert gpu.cuda.said["wait_event"] >= shards, "frames were sent ahead, on a stream of their own"
    assert gpu.cuda.said["synchronize"] == 1, "after the first batch alone"
    assert not torch.equal(*found), "computed in fp32 on a CPU"
    assert torch.allclose(*found, rtol=0.1, atol=0.05)


def rows(root) -> list[bytes]:
    return [file.read_bytes() for file in sorted((root / "shards").rglob("latents-*/*.npy"))]


def test_one_shard_is_read_while_another_is_encoded_and_a_third_written(own, monkeypatch):
    recipe = load(own.recipe).recipe
    encode(recipe, World(0, 1, 0, 1))
    expected, said, decode, write = rows(own.root), [], flow.decoded, run.write_cache
    for folder in {file.parent for file in (own.root / "shards").rglob("latents-*/*.npy")}:
        shutil.rmtree(folder)

    def decoded(*arguments):
        for part in decode(*arguments):
            said.append(("read", part.shard))
            yield part

    def write_slowly(shard, *arguments, **options):
        time.sleep(0.3)
        said.append(("written", shard.path))
        return write(shard, *arguments, **options)

    monkeypatch.setattr(flow, "decoded", decoded)
    monkeypatch.setattr(run, "write_cache", write_slowly)
    shards = encode(recipe, World(0, 1, 0, 1)).shards
    assert rows(own.root) == expected, "the bytes are those of one after the other"
    order = [what for what, _ in said]
    first = order.index("written")
    assert len({shard for what, shard in said[:first] if what == "read"}) > 1, "the second was read before that"
    assert order.count("written") == shards > 2


def test_a_bad_frame_and_a_full_disk_end_it(own, monkeypatch):
    recipe = load(own.recipe).recipe

    def full(shard, *arguments, **options):
        raise DataError(f"{shard.path}: cannot be written: no space")

    monkeypatch.setattr(run, "write_cache", full)
    with pytest.raises(DataError, match="no space"):
        encode(recipe, World(0, 1, 0, 1))
    monkeypatch.undo()
    shard = sorted((own.root / "shards").rglob("shard.*.mds"))[0]
    monkeypatch.setattr(MappedShard, "frame", lambda self, i, out: self.bytes(i, "none"))
    with pytest.raises(DataError, match=f"{shard.parent.name}.*no column 'none'"):
        encode(recipe, World(0, 1, 0, 1))


def test_the_error_of_bf16_is_said_and_a_compiled_model_writes_the_same(own, stamo, monkeypatch):
    plain = stamo("encode", own.recipe)
    assert "shards in fp32\n" in plain.stdout
    exact = rows(own.root)
    manifest = next((own.root / "shards").rglob("latents-*/manifest.json"))
    assert json.loads(manifest.read_text())["computed"] == ["fp32"]
    again = [file.parent for file in (own.root / "shards").rglob("latents-*/manifest.json")]
    for folder in again:
        shutil.rmtree(folder)
    lower = stamo("encode", own.recipe, "--arithmetic", "bf16").stdout
    error = float(re.search(r"shards in bf16, (\S+) of a row's size from fp32", lower)[1])
    assert 1e-4 < error < 5e-2
    assert rows(own.root) != exact
    assert json.loads(manifest.read_text())["computed"] == ["bf16"]
    for folder in again:
        shutil.rmtree(folder)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    recipe = load(own.recipe, ["train.micro_batch=8"]).recipe
    encode(recipe, World(0, 1, 0, 1), compiled=True)
    whole = [np.load(file).view(np.int16) for file in sorted((own.root / "shards").rglob("latents-*/*.npy"))]
    for found, bits in zip(whole, exact, strict=True):
        expected = np.load(io.BytesIO(bits)).view(np.int16)
        assert found.shape == expected.shape, "what a batch was filled up with is not written"
        assert np.abs(found.astype(int) - expected).max() <= 1, "the last bit of bfloat16"
    refused = stamo("encode", own.recipe, "--arithmetic", "tf32", check=False)
    assert refused.returncode == 2
    assert "--arithmetic tf32: CPU" in refused.stderr


def test_cached_latents_train_like_online_ones(stamo, own):
    def losses(name, *arguments):
        stamo("train", own.recipe, *STEPS, "--set", f"run_dir={own.root / name}", *arguments)
        return [json.loads(line)["loss"] for line in (own.root / name / "metrics.jsonl").read_text().splitlines()]

    missing = stamo("train", own.recipe, *STEPS, "--set", "data.latents=cached", check=False)
    assert missing.returncode == 2
    assert f"run `stamo encode {own.recipe} " in missing.stderr

    stamo("encode", own.recipe)
    assert "encoded 0 shards: what is asked for is there already" in stamo("encode", own.recipe).stdout
    # The cache holds bfloat16: 8 bits of mantissa.
    assert losses("cached", "--set", "data.latents=cached") == pytest.approx(losses("online"), rel=2e-2)
