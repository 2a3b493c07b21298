"""A tiny policy: two toy sources of which one is read as video, a random StaMo tokenizer, and a recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

from toy import make_source, make_vae

from stamo_dist.data.schema import EPISODES, MANIFEST

LLAMA = {"model_type": "llama", "vocab_size": 448, "pad_token_id": 384, "hidden_size": 16, "intermediate_size": 40,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
TEXTS = ("move the square", "Push the square down")

RECIPE = """\
name: toy_policy
stage: policy
run_dir: {run}
data:
  image_size: 32
  workers: 0
  horizon: 2
  sources:
    a: {{path: {root}/shards/a}}
    b: {{path: {root}/shards/b, actions: false, instruction: watch the square}}
policy:
  vision: stamo
  tokenizer: {root}/tokenizer
  actions: {actions}
  proprio: {proprio}
  config:
    pad_token_id: 384
    text_config: {{vocab_size: 448, pad_token_id: 384, hidden_size: 16, intermediate_size: 40, num_hidden_layers: 2,
      num_attention_heads: 2, num_key_value_heads: 2}}
  world: {{target: motion, width: 16}}
train:
  steps: 12
  global_batch: 8
  micro_batch: 2
  precision: fp32
  checkpoint: {{every: 6, keep: 9}}
optimizer: {{lr: 3e-3, warmup_steps: 2}}
strategy: {{name: {strategy}}}
"""


DIFFUSION = """\
policy:
  vision: stamo
  stamo: states
  tokenizer: {root}/tokenizer
  proprio: {proprio}
  diffusion: {{width: 16, depth: 2, heads: 2, timesteps: 50, vocabulary: 128, pseudo: {pseudo}}}
"""


def set_statistics(source: Path) -> None:
    """Statistics of the toy's actions (0 … 11 in all dimensions) and proprioception."""
    path = source / MANIFEST
    manifest = json.loads(path.read_text())
    for column, dim in (("action", 3), ("proprio", 2)):
        values = {"mean": 5.5, "std": 3.0, "min": 0.0, "max": 11.0, "q01": 0.0, "q99": 10.0}
        manifest["stats"][column] = {k: [v] * dim for k, v in values.items()} | {"mask": [True] * dim, "count": 48}
    path.write_text(json.dumps(manifest))


def make_policy_data(root: Path, cameras: tuple[str, ...] = ("front",)) -> Path:
    """Sources a (labelled, two instructions) and b (neither statistics nor instructions), and a tokenizer."""
    import torch

    import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
    from stamo_dist.models.tokenizer import Tokenizer
    from stamo_dist.recipe.schema import Flow, Model

    for name in ("a", "b"):
        source = make_source(root / "shards", name, shard_bytes=1 << 20, cameras=cameras)
    source = root / "shards" / "a"
    for split in ("train", "val"):
        table = source / split / EPISODES
        lines = [json.loads(line) for line in table.read_text().splitlines()]
        table.write_text(
            "".join(json.dumps({**line, "instruction": TEXTS[i % 2]}) + "\n" for i, line in enumerate(lines))
        )
    set_statistics(source)
    torch.manual_seed(0)
    config = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Model.model_validate(
        {
            "encoder": {"image_size": 32, "train": True, "config": config},
            "compressor": {"tokens": 2, "dim": 32, "width": 32, "depth": 1, "heads": 2},
            "decoder": {
                "config": {"patch_size": 1, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
            },
            "vae": {"weights": str(make_vae(root / "vae"))},
        }
    )
    Tokenizer.from_config(model, Flow(), 32).save_pretrained(root / "tokenizer")
    return root


def make_base(folder: Path) -> Path:
    """A checkpoint in float32 without a projector that fits, as openvla-7b is to StaMo's eyes."""
    import torch

    from stamo_dist.models.openvla.actions import Statistics
    from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
    from stamo_dist.models.openvla.images import ImageProcessor
    from stamo_dist.models.openvla.policy_network import PolicyNetwork, PolicySizes
    from stamo_dist.models.openvla.save import PolicyParts, save_parts
    from stamo_dist.models.openvla.text import TextTokenizer
    from stamo_dist.recipe.policy import OpenVLAPolicyConfig

    torch.manual_seed(3)
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, "pad_token_id": 384, "text_config": LLAMA}, "test")
    config = config.with_vision("stamo")
    network = PolicyNetwork(config, OpenVLAPolicyConfig(vision="stamo"), PolicySizes(3, patch_dim=12))
    language = {name: t for name, t in network.state_dict().items() if name.startswith("vla.language_model.")}
    text = TextTokenizer.from_instructions(TEXTS, size=384)
    save_parts(folder, PolicyParts(network, text, ImageProcessor.from_config(config), Statistics({}, "test")), language)
    return folder


def on_base(recipe: Path, base: Path) -> Path:
    """Let a recipe that `write_policy_recipe` wrote start from these weights."""
    recipe.write_text(re.sub(r"  config:\n(    .*\n)+", f"  weights: {base}\n", recipe.read_text()))
    return recipe


def write_policy_recipe(
    path: Path, root: Path, *, strategy: str = "ddp", actions: str = "tokens", proprio: bool = False
) -> Path:
    """Write the toy policy's recipe; its run folder lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run, flag = path.parent / "run", str(proprio).lower()
    path.write_text(RECIPE.format(run=run, root=root, strategy=strategy, actions=actions, proprio=flag))
    return path


def write_diffusion_recipe(
    path: Path, root: Path, *, strategy: str = "ddp", pseudo: str = "motion", proprio: bool = True
) -> Path:
    """As `write_policy_recipe`, for the diffusion transformer."""
    head, _, rest = RECIPE.partition("policy:\n")
    text = head + DIFFUSION + "train:" + rest.partition("\ntrain:")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    run, flag = path.parent / "run", str(proprio).lower()
    path.write_text(text.format(run=run, root=root, strategy=strategy, proprio=flag, pseudo=pseudo))
    return path
