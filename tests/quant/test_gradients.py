"""Gradients through rounding: where they stop, and what they are slopes of."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import I, O, bf16_normal, build_layer, outputs_and_gradients, preset
from torch import nn

from quant.config import PRESETS, QuantConfig
from quant.linear import quantize_, set_strength_
from quant.rounding import LARGEST_CODE, bf16_values, dequantize, quantize_weight, weight_gradients


@pytest.mark.parametrize("granularity", ["row", "group"])
@pytest.mark.parametrize("levels", ["int2", "int3", "int4"])
def test_absmax_clips_nothing(levels, granularity):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    config = QuantConfig(weights="absmax", levels=levels, granularity=granularity, gradient="clipped")
    codes, level = quantize_weight(weight, config)
    assert weight_gradients(torch.ones_like(weight), weight, codes, level, config)[0].all()


@pytest.mark.parametrize("levels", ["ternary", "binary", "int2", "int4"])
def test_gradients_stop_where_they_should(levels):
    weight = bf16_normal(4, 64, seed=6, size=2.0)
    config = QuantConfig(levels=levels, weights="gaussian")
    codes, level = quantize_weight(weight, config)
    ones = torch.ones_like(weight)
    outermost = LARGEST_CODE[levels] * level
    half_step = level * (0.5 if levels == "ternary" else 1.0)
    expected = {
        "identity": ones.bool(),
        "clipped": weight.abs() <= outermost,
        "trust": (codes * level - weight).abs() <= half_step * (1 + 1e-6),
    }
    for gradient, passes in expected.items():
        config = QuantConfig(levels=levels, weights="gaussian", gradient=gradient)
        assert torch.equal(weight_gradients(ones, weight, codes, level, config)[0], passes.float())
    assert expected["clipped"].sum() < expected["trust"].sum() < ones.numel()


@pytest.mark.parametrize("name", ["bitnet-b1.58", "bitnet-v2", "quest", "nielsen-2025"])
def test_gradients_of_a_ramp_meet_those_of_full_strength(name):
    """Just below strength 1 everything is as at 1, up to the rounding of the blend."""
    layer, x = build_layer(preset(name)), bf16_normal(9, I, seed=8)
    full = outputs_and_gradients(layer, x)
    layer.zero_grad()
    set_strength_(layer, 1 - 2**-22)
    almost = outputs_and_gradients(layer, x)
    for key in full:
        torch.testing.assert_close(almost[key], full[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(PRESETS))
def test_strength_0_is_the_plain_layer_for_every_recipe(name):
    layer, x = build_layer(preset(name), bias=True), bf16_normal(9, I, seed=8)
    set_strength_(layer, 0.0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("gradient", ["clipped", "trust"])
def test_gradcheck_on_a_smooth_surrogate(gradient):
    """With rounding replaced by its straight-through line, the backward pass is the derivative of the forward pass."""
    config = QuantConfig(include="", gradient=gradient, weights="gaussian", granularity="row", activations="none")
    weight = bf16_normal(5, 8, seed=9).double().requires_grad_()
    codes, level = quantize_weight(weight.detach(), config)
    slope, _ = weight_gradients(torch.ones_like(codes), weight.detach(), codes, level, config)
    constant = dequantize(codes, level).double() - slope.double() * weight.detach()
    x = bf16_normal(3, 8, seed=10).double().requires_grad_()

    def surrogate(x, weight):
        return x @ (constant + slope * weight).T

    assert torch.autograd.gradcheck(surrogate, (x, weight))
    expected = torch.autograd.grad(surrogate(x, weight).sum(), (x, weight))
    layer = nn.Linear(8, 5, bias=False).double()
    layer.weight.data.copy_(weight.data)
    quantize_(layer, config)
    ours = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_alphas_gradient_is_the_slope_of_the_loss():
    """Against finite differences, where the result is a line in alpha: weights clipped on both sides."""
    config = preset("paretoq", levels="int3")
    weight = bf16_normal(O, I, size=0.02)
    alpha = bf16_values(weight.abs().amax(1) / 64)  # nearly everything is clipped
    layer, x = build_layer(config, alpha=alpha), bf16_normal(7, I, seed=4)
    grad_y = bf16_normal(7, O, seed=7)
    ours = outputs_and_gradients(layer, x)["weight_scale"] * math.sqrt(O * I * 3)

    def loss(alpha_O):
        codes = (weight / alpha[:, None]).round().clamp(-4, 3)
        beyond = codes != weight / alpha[:, None]
        assert beyond.float().mean() > 0.8
        return ((x @ (codes * alpha_O[:, None]).T) * grad_y).sum()

    differences = torch.stack([(loss(alpha + e) - loss(alpha - e)) / 2e-4 for e in torch.eye(O) * 1e-4])
    in_codes = weight / alpha[:, None]
    inside = (in_codes >= -4) & (in_codes <= 3)
    # Inside the clip LSQ's term is code - weight / alpha, in place of the code.
    correction = -(inside * in_codes * (grad_y.T @ x)).sum(1)
    torch.testing.assert_close(ours, differences + correction, rtol=2e-2, atol=2e-2)
