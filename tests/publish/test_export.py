"""What `stamo export` writes: read again to the bit, by the official names, by plain transformers and diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from toy import make_source, write_recipe
from toy_policy import TEXTS, set_statistics, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.retention import complete
from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.pretrained.checksums import CHECKSUMS, verify
from stamo_dist.recipe.load import load

TOWERS = """\
    image_sizes: [28, 28]
    timm_kwargs: [{embed_dim: 16, depth: 3, num_heads: 2}, {embed_dim: 8, depth: 2, num_heads: 2}]
"""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "world_head.safetensors":
            found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def run(toy_policy: Path, ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that sees through StaMo."""
    recipe = write_policy_recipe(tmp_path_factory.mktemp("export") / "toy.yaml", toy_policy)
    ranks(1, "train", recipe, "--set", "train.steps=2")
    return recipe.parent / "run"


def test_hf_opens_with_plain_transformers_and_comes_back(run: Path, ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    _, said = ranks(1, "export", run, out, "--shard-size", "20KB")
    assert "step_00000002" in said
    assert len({file.stat().st_mode for file in out.rglob("*") if file.is_file()}) == 1, "a colleague can read it"
    weights = read_weights(complete(run / "checkpoints")[0][0])
    language = AutoModelForCausalLM.from_pretrained(out / "language_model")
    for name, tensor in language.state_dict().items():
        assert torch.equal(tensor, weights[f"vla.language_model.{name}"]), name
    assert len(list((out / "language_model").glob("model-*-of-*.safetensors"))) > 1
    ids = AutoTokenizer.from_pretrained(out / "language_model")(f"In: {TEXTS[0]}", add_special_tokens=False).input_ids
    policy = Policy.from_pretrained(out)
    assert ids == policy.text.tokenizer.encode(f"In: {TEXTS[0]}", add_special_tokens=False).ids
    for name, tensor in policy.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    card = (out / "README.md").read_text()
    marker = json.loads((complete(run / "checkpoints")[0][0] / "checkpoint.json").read_text())
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["world_mse"]
    for part in (marker["fingerprint"], f"{loss:.5g}", "| a | 1 shards", "intermediate_size: 40"):
        assert part in card, part

    again = load(run / "resolved.yaml").recipe.policy
    recipe = write_policy_recipe(tmp_path / "toy.yaml", Path(again.tokenizer or "").parent, strategy="fsdp")
    ranks(2, "train", recipe, "--set", f"policy.weights={out}", "--set", "train.steps=1")
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["loss"]
    begin = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < begin, "it goes on from what was learnt"


def test_openvla_has_the_released_names_and_what_the_official_code_asks_for(
    toy_policy: Path, ranks, tmp_path: Path
) -> None:
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, actions="regression", proprio=True)
    for name in ("a", "b"):
        make_source(tmp_path / "shards", name, shard_bytes=1 << 20, size=28)
    set_statistics(tmp_path / "shards/a")
    text = recipe.read_text()
    changes = {
        f"{toy_policy}/shards": f"{tmp_path}/shards",
        "image_size: 32": "image_size: 28",
        "vision: stamo": "vision: fused",
        "shards/a}": f"shards/a, instruction: {TEXTS[0]}}}",
        "    text_config": TOWERS + "    text_config",
        "  world: {target: motion, width: 16}\n": "",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    ranks(1, "train", recipe, "--set", "train.steps=2")
    run, out = tmp_path / "run", tmp_path / "out"
    ranks(1, "export", run / "checkpoints/step_00000002", out, "--format", "openvla", "--dtype", "bfloat16")

    keys = json.loads((Path(__file__).parents[1] / "models/goldens/keys/openvla_7b_state_dict.json").read_text())
    layers = {key for key in keys if not any(f".{n}." in key for n in range(2, 40))}
    found = tensors(out)
    assert {key for key in found if ".blocks.2." not in key} == layers, "two blocks a tower and two layers here"
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForVision2Seq"].endswith("--modeling_prismatic.OpenVLAForActionPrediction")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert config["norm_stats"].keys() == json.loads((out / "dataset_statistics.json").read_text()).keys() == {"a"}
    head = torch.load(out / "action_head--latest_checkpoint.pt", weights_only=True)
    assert all(key.startswith("module.") for key in head)
    card = (out / "README.md").read_text()
    assert [p.name for p in sorted(out.glob("*.pt")) if f"`{p.name}`" not in card] == [], "the card says why"
    weights = read_weights(run / "checkpoints/step_00000002")
    for name, tensor in Policy.from_pretrained(out).network.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16()), name


def check_checksums(out: Path) -> None:
    """Every weight file is listed, with the digest that xxhsum would print, and a change of a byte is noticed."""
    listed = {name: digest for digest, name in map(str.split, (out / CHECKSUMS).read_text().splitlines())}
    files = sorted(out.rglob("*.safetensors"))
    assert len(files) > 4
    assert listed == {str(f.relative_to(out)): xxhash.xxh128(f.read_bytes()).hexdigest() for f in files}
    verify(out, "init_from")
    content = bytearray(files[-1].read_bytes())
    files[-1].write_bytes(content[:-1] + bytes([content[-1] ^ 8]))
    with pytest.raises(CheckpointError, match=f"changed since it was exported: {files[-1].relative_to(out)};"):
        verify(out, "init_from")
    files[-1].write_bytes(content)
    lines = (out / CHECKSUMS).read_text()
    (out / CHECKSUMS).write_text(lines[: lines.rindex("\n", 0, -1) + 1])
    with pytest.raises(CheckpointError, match=f"does not have {files[-1].relative_to(out)}: the list is cut off"):
        verify(out, "init_from")
    (out / CHECKSUMS).write_text(lines)


def test_a_tokenizer_comes_back_and_opens_with_diffusers(toy, ranks, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    ranks(1, "train", recipe, "--set", "train.steps=2")
    run = Path(load(recipe).recipe.run_dir)
    ranks(1, "export", run, tmp_path / "out", "--shard-size", "20KB")
    before, after = Tokenizer.from_pretrained(run), Tokenizer.from_pretrained(tmp_path / "out")
    assert before.fingerprint() == after.fingerprint()
    opened = SD3Transformer2DModel.from_pretrained(tmp_path / "out/transformer").state_dict()
    for name, tensor in before.trained.decoder.transformer.state_dict().items():
        assert torch.equal(tensor, opened[name]), name
    check_checksums(tmp_path / "out")
    ranks(1, "export", run, tmp_path / "half", "--dtype", "bfloat16")
    half = Tokenizer.from_pretrained(tmp_path / "half").trained.compressor.queries
    assert torch.equal(half, before.trained.compressor.queries.bfloat16().float())


def test_what_cannot_be_exported_is_refused(run: Path, ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, why in (
        ((run, tmp_path / "file" / "o" / "o"), "cannot be written (Not a directory); make room or give another folder"),
        ((run, tmp_path / "o", "--format", "openvla"), "the official code has no StaMo encoder"),
        ((tmp_path, tmp_path / "o"), "not a run folder"),
        ((run, tmp_path), "exists; give a folder that does not"),
        ((run, tmp_path / "o", "--shard-size", "big"), "--shard-size big: give a size as 5GB"),
    ):
        code, said = ranks(1, "export", *arguments, check=False)
        assert code == 2
        assert why in said
    assert not (tmp_path / "o").exists()
