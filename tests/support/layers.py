"""Small layers to quantize, and what a backward pass through them gives."""

import pytest
import torch
from torch import nn

from quant.config import PRESETS, QuantConfig
from quant.linear import add_learned_scales_, quantize_
from quant.rounding import dequantize, first_alpha, quantize_activation, quantize_weight

I, O = 64, 24  # noqa: E741
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERYTHING = QuantConfig(include="")


def bf16_normal(*shape, seed=0, size=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16().float()


def build_layer(config, bias=False, alpha=None):
    layer = nn.Linear(I, O, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(bf16_normal(O, I, size=0.02))
        if bias:
            layer.bias.copy_(bf16_normal(O, seed=1))
    model = nn.ModuleDict({"down_proj": layer})
    if config.learned:
        add_learned_scales_(model, config)
        with torch.no_grad():
            largest = layer.weight.abs().amax(1)
            layer.weight_scale.copy_(first_alpha(largest, config.levels) if alpha is None else alpha)
    quantize_(model, config)
    return layer


def outputs_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(bf16_normal(*y.shape, seed=7))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | gradients


def preset(name, **keys):
    return QuantConfig(**(vars(PRESETS[name]) | {"include": ""} | keys))


def build_linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(24, 10, bias=bias).to(dtype)


def build_input(dtype=torch.float32):
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def forward_backward(layer, x):
    """Output and gradients, by the input's and the parameters' names."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    y.backward(weights)
    result = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    return result


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def dequantized(layer, x, config):
    """The operands at strength 1, in the layer's dtype."""
    weight = dequantize(*quantize_weight(layer.weight.detach(), config)).to(layer.weight.dtype)
    if config.activations == "none":
        return weight, x
    codes, scale = quantize_activation(x, config.activations)
    return weight, (codes * scale).to(x.dtype)
