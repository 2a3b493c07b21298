"""The two kinds of policy: what checkpoints record of each is what it was before they were two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stamo_dist.recipe.load import dump, load

RECIPE = """\
stage: policy
data: {{horizon: 8, sources: {{a: {{path: shards/a}}}}}}
train: {{steps: 10, global_batch: 12}}
policy: {policy}
"""
#: Written by the commit before (`json.dumps` of the dump that a checkpoint's identity is made of), for these policies.
RECORDED = {
    "{vision: stamo, tokenizer: x, world: {}}": (
        '{"config": {}, "vision": "stamo", "stamo": "both", "views": 1, "proprio": false, "actions": "tokens", '
        '"film": false, "bounds": "q99", "prompt": "openvla", "action_weight": 1.0, "lora": null, "freeze": '
        '{"vision": false, "projector": false, "language": false}, "world": {"target": "state", "weight": 1.0, '
        '"mse": 1.0, "l1": 1.0, "width": 1024, "read": "prompt"}, "diffusion": null}'
    ),
    "{vision: stamo, stamo: patches, proprio: true, tokenizer: x, diffusion: {width: 768, depth: 18, heads: 12}}": (
        '{"config": {}, "vision": "stamo", "stamo": "patches", "views": 1, "proprio": true, "actions": "tokens", '
        '"film": false, "bounds": "q99", "prompt": "openvla", "action_weight": 1.0, "lora": null, "freeze": '
        '{"vision": false, "projector": false, "language": false}, "world": null, "diffusion": {"width": 768, '
        '"depth": 18, "heads": 12, "timesteps": 1000, "sampler_steps": 5, "vocabulary": 512, "pseudo": "motion", '
        '"pseudo_per": "chunk", "pseudo_weight": 1.0}}'
    ),
}


@pytest.mark.parametrize("policy", RECORDED)
def test_a_checkpoint_records_what_it_did_before(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.format(policy=policy))
    recipe = load(path).recipe
    recorded = recipe.policy.model_dump(exclude={"weights", "tokenizer", "targets"})
    assert json.dumps(recorded) == RECORDED[policy]
    path.write_text(dump(recipe))
    assert load(path).recipe == recipe
