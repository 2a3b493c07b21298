"""SD3's attention with joined products, beside diffusers' own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from stamo_dist.models.decoder import Decoder

INPUTS = (3, 4, 8, 8)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor, Counter[str]]:
    torch.manual_seed(0)
    z, tokens, level = torch.randn(INPUTS, requires_grad=True), torch.randn(3, 2, 24), torch.tensor([900.0, 500.0, 9.0])
    model.requires_grad_(True).zero_grad()
    with Products() as products:
        out = model(z, tokens, tokens.flatten(1), level).sample
    out.square().sum().backward()
    assert z.grad is not None
    return out.detach(), z.grad, products.made


@pytest.mark.parametrize("version", ["sd3", "sd3.5"])
def test_same_velocity_and_gradients_from_fewer_products(
    sd3: Callable[..., SD3Transformer2DModel], configs: dict, version: str
) -> None:
    model = sd3(configs[version], joint=24, pooled=48)
    expected, of_input, three = run(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    Decoder(model)
    out, gradient, one = run(model)
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, of_input)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients)
    attentions = sum(1 + (block.attn2 is not None) for block in model.transformer_blocks)
    assert three["addmm"] - one["addmm"] == 2 * (attentions + len(model.transformer_blocks))


def test_layers_that_are_gathered_when_called_are_called(sd3: Callable[..., SD3Transformer2DModel]) -> None:
    """As zero3 does, which marks its parameters."""
    model = sd3(joint=24, pooled=48)
    expected, of_input, three = run(model)
    Decoder(model)
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
    out, gradient, made = run(model)
    assert torch.equal(out, expected)
    assert torch.equal(gradient, of_input)
    assert made["addmm"] == three["addmm"]
