"""What does not fit a policy is refused before anything is trained, by source, sample and field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_policy import TEXTS, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import StamoError
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.load import load
from stamo_dist.tasks import build_task, check_task
from stamo_dist.tasks.base import ExportLayout


def refusal(recipe: Path, *settings: str, build: bool = False) -> str:
    loaded = load(recipe, list(settings)).recipe
    mixture = Mixture(loaded.data, seed=0, global_batch=8)
    if build:
        check_task(loaded, mixture)
    with pytest.raises(StamoError) as caught:
        (build_task if build else check_task)(loaded, mixture)
    return str(caught.value)


def test_statistics_of_other_data(toy_policy: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(toy_policy / "shards", tmp_path / "shards"))
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy)
    path = shards / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    source = f"data.sources.a.path={shards}/a"

    manifest["stats"]["action"]["count"] = 47
    path.write_text(json.dumps(manifest))
    assert f"{shards}/a has statistics of 47 frames, but 48 frames; run `stamo data stats" in refusal(recipe, source)

    manifest["stats"]["action"] |= {"count": 48, "max": [11.0, 4.5, 11.0]}
    path.write_text(json.dumps(manifest))
    said = refusal(recipe, source)
    for part in ("data.sources.a: ", "sample 5 (episode a-train-0)", "action[1] is 5, outside the statistics' 0 … 4.5"):
        assert part in said, said


def test_a_run_in_which_no_sample_has_an_action_loss(toy_policy: Path, tmp_path: Path, stamo: Any) -> None:
    """The check of the recipe, the mixture's table and the training say the same, and nothing is written."""
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy)
    said = "the longest episode of a whose actions are read has 12 frames; set data.horizon: 12 or less"
    assert said in refusal(recipe, "data.horizon=16")
    for command in (["train"], ["recipe", "check"]):
        refused = stamo(*command, recipe, "--set", "data.horizon=16", check=False)
        assert refused.returncode == 2
        assert said in refused.stderr
    assert not (tmp_path / "run").exists()
    shares = (
        "action loss: 45.8% of the samples (a 91.7%, b 0.0%)",
        "no actions from: b (actions: false)",
        "world loss: 83.3% of the samples (a 83.3%, b 83.3%)",
    )
    for command in (["mix"], ["recipe", "check"]):
        printed = stamo(*command, recipe).stdout
        assert all(line in printed for line in shares), printed


def test_weights_of_another_tower_vocabulary_or_size(toy_policy: Path, tmp_path: Path) -> None:
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy)
    loaded = load(recipe).recipe
    mixture = Mixture(loaded.data, seed=0, global_batch=8)
    task = build_task(loaded, mixture)
    weights = tmp_path / "weights"
    task.export(weights, task.trained.state_dict(), [], ExportLayout())
    use = f"policy.weights={weights}"
    assert build_task(load(recipe, [use]).recipe, mixture)

    assert "policy.vision: fused, but" in refusal(recipe, use, "policy.vision=fused", "data.image_size=32")
    said = refusal(recipe, use, "policy.config.text_config.hidden_size=32", "policy.config.n_action_bins=128")
    assert f"policy.config.text_config.hidden_size: 32, but {weights} has 16" in said
    assert "policy.config.n_action_bins: 128" in said

    other = tmp_path / "tokenizer"
    shutil.copytree(toy_policy / "tokenizer", other)
    changed = Tokenizer.from_pretrained(other)
    with torch.no_grad():
        changed.trained.compressor.queries.add_(1)
    shutil.rmtree(other)
    changed.save_pretrained(other)
    said = refusal(recipe, use, f"policy.tokenizer={other}", build=True)
    assert f"was trained to see through another StaMo tokenizer than {other}" in said

    TextTokenizer.from_instructions(TEXTS, size=512).save(weights)
    assert "tokenizer.json has 513 ids, but the network's vocabulary is 384, padded to 448" in refusal(
        recipe, use, build=True
    )
