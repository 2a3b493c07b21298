"""What a training says of its cache before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

from toy import make_source, write_recipe


def test_the_first_lines_say_what_the_cache_must_hold_and_too_small_a_one_is_refused(
    stamo: Callable[..., CompletedProcess[str]], toy: SimpleNamespace, tmp_path: Path
) -> None:
    for name, episodes in (("a", 5), ("b", 3)):
        make_source(tmp_path / "shards", name, episodes=episodes, shard_bytes=8_000, compression="zstd")
    recipe = write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae)
    common = ("train", recipe, "--set", f"data.cache={tmp_path / 'cache'}", "--set", "train.steps=2")
    refused = stamo(*common, "--set", "data.cache_limit=1e-5", check=False)
    assert refused.returncode == 2
    assert "data.cache_limit: 1e-05 GB, but the shards of one batch take" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists(), "it was refused before anything was written"
    output = stamo(*common, "--set", "data.cache_limit=1").stdout
    said = [line for line in output.splitlines() if "shards in use at once" in line]
    assert len(said) == 1
    assert f"GB on each node, data.cache_limit gives 1 in {tmp_path / 'cache'}" in said[0]
    assert output.index(said[0]) < output.index("exported")
