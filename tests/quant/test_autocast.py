"""Layers of other programs' models under ``torch.autocast``: codes and their products are those without it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layers import I, bf16_normal, build_layer
from torch import Tensor, nn

from quant import integers
from quant.config import IN_2_BITS, PRESETS, QuantConfig
from quant.linear import set_strength_
from quant.packed import freeze_

CONFIGS = {
    **PRESETS,
    "groups": QuantConfig(granularity="group", group_size=8),
    "16-bit inputs": QuantConfig(activations="none"),
    "int8 gradients": QuantConfig(backward="int8"),
}
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def quantized(name: str) -> nn.Module:
    return build_layer(replace(CONFIGS[name], include=""), bias=True)


def gradients(y: Tensor, x: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("has_int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_bit_changes_at_full_strength(name, dtype, has_int8, monkeypatch):
    monkeypatch.setattr(integers, "CPU_HAS_INT8", has_int8)
    layer, x = quantized(name), bf16_normal(3, 5, I).to(dtype).requires_grad_()
    plain = layer(x)
    with torch.autocast(**AUTOCAST):
        y = layer(x)
    assert y.dtype == dtype  # also with a bias in fp32
    for found, expected in zip((y, *gradients(y, x, layer)), (plain, *gradients(plain, x, layer)), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    if CONFIGS[name].levels in IN_2_BITS:
        model = nn.ModuleDict({"down_proj": layer})
        freeze_(model)
        with torch.autocast(**AUTOCAST):
            assert torch.equal(model["down_proj"](x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["blend", "softmax"])
@pytest.mark.parametrize("name", ["bitnet-b1.58", "quest", "paretoq"])
def test_a_ramp_multiplies_as_autocast_does(name, rounding, dtype):
    layer, x = quantized(name), bf16_normal(3, 5, I).to(dtype).requires_grad_()
    layer.rounding = rounding
    set_strength_(layer, 0.25)
    with torch.autocast(**AUTOCAST):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    wide = x.detach().float().requires_grad_()
    exact = layer(wide)
    assert (y - exact).norm() < 0.01 * exact.norm()
    for found, expected in zip(gradients(y, x, layer), gradients(exact, wide, layer), strict=True):
        assert found.dtype == (dtype if found.shape == x.shape else torch.float32)
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_at_strength_0_the_layer_is_a_plain_one():
    layer, x = quantized("bitnet-b1.58"), bf16_normal(3, I).float()
    set_strength_(layer, 0.0)
    with torch.autocast(**AUTOCAST):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
