from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model

from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.models.encoder import Encoder
from stamo_dist.models.images import imagenet_normalise, resize, to_float
from stamo_dist.recipe import schema


def load(official: Path, size: int) -> Encoder:
    return Encoder.from_config(schema.EncoderConfig(weights=str(official / "dino"), image_size=size)).eval()


@pytest.mark.parametrize("size", [70, 42, 98])  # that of the checkpoint, smaller, larger
def test_features_are_transformers_own(official: Path, frames: torch.Tensor, size: int, monkeypatch) -> None:
    theirs = Dinov2Model.from_pretrained(official / "dino").eval()
    pixels = imagenet_normalise(resize(to_float(frames), size))
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 1:]  # it interpolates its position embeddings in this call
    ours = load(official, size)
    monkeypatch.setattr(torch.nn.functional, "interpolate", _only_images)
    with torch.no_grad():
        features = ours(frames)
    assert features.shape == (3, (size // 14) ** 2, 32)
    torch.testing.assert_close(features, expected, atol=0, rtol=0)


_interpolate = torch.nn.functional.interpolate


def _only_images(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    assert x.shape[1] == 3, "the position embeddings were interpolated in a forward pass"
    return _interpolate(x, *args, **kwargs)


def test_both_forms_of_images_give_the_same_features(official: Path, frames: torch.Tensor) -> None:
    encoder = load(official, 42)
    as_float = frames.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(encoder(frames), encoder(as_float), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"images are torch.uint8 \(3, 3, 32, 32\)"):
        encoder(frames.permute(0, 3, 1, 2))


def test_resize_is_pillows_bicubic(frames: torch.Tensor) -> None:
    small = resize(to_float(frames), 14)[0].permute(1, 2, 0).numpy() * 255
    theirs = np.asarray(Image.fromarray(frames[0].numpy()).resize((14, 14), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(small - theirs).max() <= 1  # Pillow rounds to whole grey levels


def test_wrong_checkpoint_and_wrong_fields_are_refused(official: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type None, expected dinov2"):
        Encoder.from_config(schema.EncoderConfig(weights=str(official / "sd3" / "vae")))
    with pytest.raises(RecipeError, match="num_hidden_layer: unknown field; did you mean num_hidden_layers"):
        Encoder.from_config(schema.EncoderConfig(config={"num_hidden_layer": 2}, train=True))
    with pytest.raises(RecipeError, match="40 is not a multiple of the patch size 14"):
        load(official, 40)


def test_the_class_token_alone_is_a_baseline_that_survives_saving(tmp_path):
    torch.manual_seed(0)
    config = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = {"image_size": 16, "train": True, "config": config, "output": "cls"}
    made = Encoder.from_config(schema.EncoderConfig.model_validate(encoder))
    images = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    token = made(images)
    assert token.shape == (3, 1, 32)
    patches = Encoder(made.model, 16)
    assert patches(images).shape == (3, 4, 32)
    assert patches.fingerprint() != made.fingerprint()
    made.save_pretrained(tmp_path)
    assert torch.equal(Encoder.from_folder(tmp_path, 16, "cls")(images), token)
