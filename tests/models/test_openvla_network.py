"""OpenVLA's network against the official implementation's outputs, and the released names at full size."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from vla_cases import TINY, Golden, close, goldens, text_tokenizer

from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.network import OpenVLA
from stamo_dist.models.openvla.policy import Policy, Unsaid


def network(golden: Golden) -> OpenVLA:
    config = OpenVLAConfig.from_folder(golden.folder, "policy.weights", golden.towers)
    vla = OpenVLA(config).eval()
    vla.load_state_dict({k: v.float() for k, v in load_file(golden.folder / "model.safetensors").items()})
    return vla


@pytest.mark.parametrize("name", ["openvla/fwd_dev", "openvla/dev"])
def test_features_logits_loss_and_gradients(name: str) -> None:
    golden = Golden(name)
    given, expected = golden.inputs, golden.expected
    vla, valid = network(golden), golden.expected["train.valid"]
    pixels, ids, mask = given["train.pixel_values"], given["train.input_ids"], given["train.attention_mask"]
    towers = vla.vision_backbone
    close(towers.patch_features(towers.featurizer, pixels[:, :3]), expected["train.patches_featurizer"])
    close(towers.patch_features(towers.fused_featurizer, pixels[:, 3:]), expected["train.patches_fused_featurizer"])
    close(towers(pixels), expected["train.vision_features"])
    close(vla.image_tokens(pixels), expected["train.projector_features"])
    sequence = vla.sequence(ids, pixels, mask)
    close(sequence.embeddings, expected["train.embeddings"])
    close(vla.hidden(sequence)[valid], expected["train.last_hidden_state"][valid])

    logits, loss = vla(ids, pixels, mask, given["train.labels"])
    if "train.logits" in expected:
        close(logits[valid], expected["train.logits"][valid])
    close(logits.logsumexp(-1)[valid], expected["train.logits_logsumexp"][valid])
    assert torch.equal(logits.argmax(-1)[valid], expected["train.logits_argmax"][valid])
    close(loss, expected["train.loss"].squeeze(), 1e-5)
    loss.backward()
    norms = golden.about["train_grads_norm_and_sum"]
    assert {n for n, g in norms.items() if g is None} == {n for n, p in vla.named_parameters() if p.grad is None}
    for key, parameter in vla.named_parameters():
        if parameter.grad is not None:
            assert float(parameter.grad.norm()) == pytest.approx(norms[key][0], rel=1e-4, abs=1e-6), key

    text = given["text_only.input_ids"]
    logits, loss = vla(text, labels=text)
    close(logits.logsumexp(-1), expected["text_only.logits_logsumexp"])
    close(loss, expected["text_only.loss"].squeeze(), 1e-5)


def test_greedy_decoding_and_actions() -> None:
    golden = Golden("openvla/dev")
    policy = Policy.from_pretrained(
        golden.folder, unsaid=Unsaid(tower_options=golden.towers), text=text_tokenizer(), dtype=torch.float32
    )
    for i, case in enumerate(golden.about["predict_action"]):
        pixels, name = golden.inputs[f"predict{i}.pixel_values"], f"predict{i}"
        ids, logits, _ = policy.network.vla.generate(golden.prompt(name).input_ids, pixels, len(case["generated_ids"]))
        assert ids[0].tolist() == case["generated_ids"]
        close(logits[0].max(-1).values, golden.expected[f"{name}.step_top1_logit"])
        actions, _ = policy.predict_encoded(golden.prompt(name), pixels, unnorm_key=case["unnorm_key"])
        close(actions[0, 0], golden.expected[f"{name}.actions"], 1e-12)


def test_prompts_of_different_lengths_decode_as_if_alone() -> None:
    golden = Golden("openvla/fwd_dev")
    vla = network(golden)
    pixels = golden.inputs["train.pixel_values"]
    ids, mask = golden.inputs["train.input_ids"], golden.inputs["train.attention_mask"].clone()
    mask[0, 9:], mask[1, 5:], mask[2] = False, False, True
    together, logits, states = vla.generate(ids, pixels, 4, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = vla.generate(ids[row : row + 1, :length], pixels[row : row + 1], 4)
        assert together[row].tolist() == alone[0][0].tolist()
        close(logits[row], alone[1][0])
        close(states[row], alone[2][0])


def test_full_size_has_the_released_names_and_shapes() -> None:
    released = json.loads(goldens("keys/openvla_7b_state_dict.json").read_text())
    assert json.loads(goldens("keys/openvla_7b_config_as_converted.json").read_text()) | {
        "transformers_version": ""
    } == OPENVLA_7B | {"transformers_version": ""}
    with torch.device("meta"):
        vla = OpenVLA(OpenVLAConfig.from_dict(OPENVLA_7B, "test"))
    state = vla.state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == released
    assert (len(state), sum(t.numel() for t in state.values())) == (982, 7_541_237_184)
    assert vla.language_model.config.rms_norm_eps == 1e-6


def test_one_tower_as_in_openvla_v01() -> None:
    raw = {k: v for k, v in {**OPENVLA_7B, **TINY}.items() if not k.startswith("timm_") and k != "image_sizes"}
    raw |= {"vision_backbone_id": "siglip-vit-so400m", "timm_kwargs": [{"embed_dim": 8, "depth": 2, "num_heads": 2}]}
    config = OpenVLAConfig.from_dict(raw, "test")
    assert (config.towers[0].model, config.towers[0].image_size) == ("vit_so400m_patch14_siglip_224", 224)
    vla = OpenVLA(config)
    assert {n: list(p.shape) for n, p in vla.projector.named_parameters() if n.endswith("weight")} == {
        "fc1.weight": [16, 8],
        "fc2.weight": [16, 16],
    }
    assert vla.image_tokens(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 16)
    with pytest.raises(ValueError, match="4 channels, not 3 for each view"):
        vla.image_tokens(torch.zeros(1, 4, 224, 224))
    with pytest.raises(CheckpointError, match="vision_backbone_id 'clip-vit-b' is not known"):
        OpenVLAConfig.from_dict({**raw, "vision_backbone_id": "clip-vit-b"}, "test")
