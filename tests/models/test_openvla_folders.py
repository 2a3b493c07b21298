"""Policies written and read: whole, adapted, sharded over processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from vla_cases import INSTRUCTIONS, TINY, close, text_tokenizer

from stamo_dist.distributed.rank import reserve_port
from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.export_layout import ExportLayout
from stamo_dist.models.openvla import adapt, load
from stamo_dist.models.openvla.actions import Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import PolicyParts, save_parts, save_pretrained
from stamo_dist.pretrained.wanted import look_at
from stamo_dist.recipe import policy as recipe
from stamo_dist.recipe import schema

COLUMN: dict[str, Any] = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "min": [-2.0, 0.0], "max": [2.0, 5.0]}
STATISTICS = {"toy": {"action": {**COLUMN, "mask": [True, False]}, "proprio": COLUMN}}
KINDS: dict[str, dict[str, Any]] = {
    "openvla": {"world": {"target": "state", "width": 24}},
    "oft": {"actions": "regression", "proprio": True, "views": 2, "film": True},
}


def make(kind: str) -> Policy:
    torch.manual_seed(0)
    cfg = recipe.OpenVLAPolicyConfig.model_validate(KINDS[kind])
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test")
    sizes = PolicySizes(2, 3 if kind == "oft" else 1, 2 if cfg.proprio else 0, (2, 8) if cfg.world else None)
    network = PolicyNetwork(config, cfg, sizes).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return Policy(network, text_tokenizer(), ImageProcessor.from_config(config), Statistics(STATISTICS, "test"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("policies")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            save_pretrained(make(kind), root / kind, shard_size="20KB")
        return root / kind

    return folder


def moment(policy: Policy) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "image": [rng.integers(0, 255, (28, 28, 3), np.uint8) for _ in range(policy.cfg.views)],
        "instruction": INSTRUCTIONS[0],
        "proprio": np.array([0.3, 1.0]) if policy.cfg.proprio else None,
    }


def test_a_login_node_finds_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    save_pretrained(make("openvla"), folder)

    def problems(**policy: Any) -> list[str]:
        given = schema.Recipe.model_validate({
            "stage": "policy", "data": {"sources": {"a": {"path": "a"}}, "horizon": 1}, "train": {"steps": 1},
            "policy": {"weights": str(folder), "vision": "fused", "world": None, **policy},
        })  # fmt: skip
        return look_at(given, {}).problems["policy.weights"]

    assert problems() == []
    (found,) = problems(config={"text_config": {"hidden_size": 99}})
    assert found.startswith(f"policy.config.text_config.hidden_size: 99, but {folder} has 16")
    (folder / "tokenizer.json").unlink()
    assert problems() == [f"policy.weights: {folder} has no tokenizer.json; copy the tokenizer of the checkpoint there"]
    about = json.loads((folder / "config.json").read_text())
    about["text_config"]["hidden_size"], about["timm_model_ids"] = 32, []
    (folder / "config.json").write_text(json.dumps(about))
    size, towers, _ = problems()
    assert "has language_model.model.embed_tokens.weight [576, 16], its config.json asks for [576, 32]" in size
    assert towers.startswith(f"policy.vision: fused, but {folder} has no towers of its own")


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_comes_back_as_it_was(kind: str, folders: Callable[[str], Path]) -> None:
    before, after = make(kind), Policy.from_pretrained(folders(kind))
    assert len(list(folders(kind).glob("model-*-of-*.safetensors"))) > 2
    state = after.network.state_dict()
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    found = after.act(**moment(after))
    assert found.shape == (after.network.sizes.chunk, 2)
    assert np.array_equal(found, before.act(**moment(before)))
    assert Policy.from_pretrained(folders(kind), dtype=torch.bfloat16).act(**moment(after)).shape == found.shape
    _, world = after.predict([moment(after)["image"]], [INSTRUCTIONS[0]], proprio=np.zeros((1, 2)))
    assert (None if world is None else world.shape) == (None if kind == "oft" else (1, 2, 8))


def test_a_batch_acts_as_its_moments_alone(folders: Callable[[str], Path]) -> None:
    """Without FiLM, which reads the padding of a batch, as the official code does."""
    policy = Policy.from_pretrained(folders("openvla"))
    rng = np.random.default_rng(1)
    images = [[rng.integers(0, 255, (40, 30, 3), np.uint8)] for _ in INSTRUCTIONS]
    together = policy.act_batch(images, INSTRUCTIONS)
    for i, instruction in enumerate(INSTRUCTIONS):
        assert np.array_equal(together[i], policy.act(images[i], instruction))


def test_the_official_code_s_files_are_there(folders: Callable[[str], Path]) -> None:
    folder = folders("oft")
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "dataset_statistics.json", "preprocessor_config.json", "tokenizer.json"} <= names
    head = torch.load(folder / "action_head--latest_checkpoint.pt", weights_only=True)
    assert {k.split(".")[0] for k in head} == {"module"}
    towers = torch.load(folder / "vision_backbone--latest_checkpoint.pt", weights_only=True)
    assert "vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_A.default.weight" in towers
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "vision_backbone.featurizer.blocks.0.attn.qkv.weight" in index
    assert not [k for k in index if "scale." in k or "shift." in k]
    for name in set(index.values()):
        with safe_open(folder / name, "pt") as file:
            assert file.metadata()["format"] == "pt"  # without which transformers refuses the file


def test_the_form_hf_is_safetensors_alone_and_comes_back(tmp_path: Path) -> None:
    before, folder = make("oft"), tmp_path / "hf"
    parts = PolicyParts(before.network, before.text, before.processor, before.statistics, before.framing)
    save_parts(folder, parts, before.network.state_dict(), ExportLayout("hf"))
    beside = {"action_head.safetensors", "proprio_projector.safetensors", "vision_backbone.safetensors"}
    assert {p.name for p in folder.iterdir()} >= beside
    assert not list(folder.rglob("*.pt"))
    after = Policy.from_pretrained(folder).network.state_dict()
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def test_adapters_start_as_nothing_and_merge(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain = Policy.from_pretrained(folders("openvla"))
    with load.on_meta():
        network = PolicyNetwork(plain.network.vla.config, plain.cfg, plain.network.sizes)
        cfg = plain.cfg.model_copy(update={"freeze": recipe.Freeze(vision=True), "lora": recipe.Lora(rank=4)})
        layers = adapt.prepare(network, cfg)
    assert "language_model.lm_head" in layers
    assert not [name for name in layers if name.startswith("vision_backbone")]
    load.materialise(network)
    load.WeightLoader(network, load.stored(folders("openvla"), network), "here").write(network)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("world_head.") for n in trained)
    plain_network, plain.network = plain.network, network.eval()
    given = moment(plain)
    adapted = plain.predict([given["image"]], [given["instruction"]])[1]
    plain.network = plain_network
    close(adapted, plain.predict([given["image"]], [given["instruction"]])[1], 1e-6)

    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    plain.network = network
    changed = plain.predict([given["image"]], [given["instruction"]])[1]
    assert (changed - adapted).abs().max() > 1e-3
    adapt.merge_lora(network.vla)
    save_pretrained(plain, tmp_path)
    close(Policy.from_pretrained(tmp_path).predict([given["image"]], [given["instruction"]])[1], changed, 1e-4)
    with pytest.raises(RecipeError, match=r"policy.lora.targets: \['nothing'\] matches no layer"):
        adapt.prepare(plain_network, plain.cfg.model_copy(update={"lora": recipe.Lora(targets=["nothing"])}))


def _rank(rank: int, port: int, source: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    cfg = recipe.OpenVLAPolicyConfig.model_validate({**KINDS["openvla"], "actions": "regression"})
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test")
    with load.on_meta():
        network = PolicyNetwork(config, cfg, PolicySizes(2, 3, 0, (2, 8)))
    assert all(p.is_meta for p in network.parameters())
    for module in list(network.modules()):
        if type(module).__name__ in network.block_classes():
            fully_shard(module)
    fully_shard(network)
    load.materialise(network)
    local = sum(p.to_local().numel() for p in network.parameters())  # type: ignore[attr-defined]
    assert local < 0.6 * sum(p.numel() for p in network.parameters())
    load.WeightLoader(network, load.stored(Path(source), network), source, fresh=load.fresh_parts(cfg), seed=7).write(
        network
    )
    whole = {n: t.full_tensor() for n, t in network.state_dict().items()}
    ids = torch.tensor([[1, 5, 6, 7, 8, 2, 2, 2, 2, 2, 2, 2]])
    inputs = Inputs(ids, ids > 0, torch.tensor([5]), torch.ones(1, 6, 28, 28), None, None, torch.zeros(1, 3, 2))
    losses = network(inputs)
    losses.action.sum().backward()
    if rank == 0:
        save_file({**whole, "loss": losses.action.detach()}, f"{out}/whole.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def test_every_process_reads_its_own_shards(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = folders("openvla")
    mp.start_processes(_rank, (reserve_port(), str(source), str(tmp_path)), nprocs=2, start_method="fork")
    sharded = load_file(tmp_path / "whole.safetensors")
    cfg = recipe.OpenVLAPolicyConfig.model_validate({**KINDS["openvla"], "actions": "regression"})
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test")
    with load.on_meta():
        network = PolicyNetwork(config, cfg, PolicySizes(2, 3, 0, (2, 8)))
    load.materialise(network)
    report = load.WeightLoader(
        network, load.stored(source, network), "here", fresh=load.fresh_parts(cfg), seed=7
    ).write(network)
    assert {name.split(".")[0] for name in report.reinitialised} == {"action_head"}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, sharded[name]), name
    assert 0 < network.action_head.model.fc1.weight.std() < 1  # type: ignore[union-attr, operator]


def test_other_eyes_start_from_the_same_language_model(folders: Callable[[str], Path]) -> None:
    source = folders("openvla")
    base = OpenVLAConfig.from_folder(source, "policy.weights")
    for vision, sizes, fresh in [
        ("dinov2", PolicySizes(2), {"vla.projector"}),
        ("stamo", PolicySizes(2, patch_dim=12, state_dim=8), {"vla.projector", "vla.state_projector"}),
    ]:
        cfg = recipe.OpenVLAPolicyConfig(vision=vision)  # type: ignore[arg-type]
        with load.on_meta():
            network = PolicyNetwork(base.with_vision(vision), cfg, sizes)  # type: ignore[arg-type]
        load.materialise(network)
        found = load.stored(source, network)
        report = load.WeightLoader(network, found, "here", fresh=load.fresh_parts(cfg)).write(network)
        assert {name.rsplit(".", 2)[0] for name in report.reinitialised} == fresh
        files = [load_file(file) for file in source.glob("model*.safetensors")]
        (head,) = [f["language_model.lm_head.weight"] for f in files if "language_model.lm_head.weight" in f]
        assert torch.equal(network.vla.language_model.lm_head.weight, head)
        with pytest.raises(CheckpointError, match=r"policy.weights: the checkpoint does not fit the policy"):
            load.WeightLoader(network, found, "here").write(network)


def test_what_does_not_fit_is_refused_with_the_way_out(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("oft"), tmp_path / "oft"))
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=match):
            Policy.from_pretrained(folder)

    refused("only Llama language models", text_config={"model_type": "phi"})
    refused("says model_type llava, expected openvla", model_type="llava")
    refused("timm cannot build vit_of_nobody", timm_model_ids=["vit_of_nobody", "vit_so400m_patch14_siglip_224"])
    refused("image_sizes must have 2 entries", image_sizes=[28])
    refused(
        r"embed_tokens.weight: \[576, 16\] in the checkpoint, \[640, 16\] in the model",
        text_config={**config["text_config"], "vocab_size": 640},
    )
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "action_head--latest_checkpoint.pt", folder / "action_head--10_checkpoint.pt")
    with pytest.raises(CheckpointError, match="several of action_head"):
        Policy.from_pretrained(folder)
    (folder / "action_head--10_checkpoint.pt").unlink()
    (folder / "action_head--latest_checkpoint.pt").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"action_head--latest_checkpoint.pt is no map of tensors"):
        Policy.from_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=r"hf download openvla/openvla-7b --local-dir DIR` and set policy.weights"
    ):
        Policy.from_pretrained("openvla/openvla-7b")
