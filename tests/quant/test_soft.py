"""Soft rounding: expected codes, their gradient, and both ends of a ramp."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from devices import CPU, every_device
from layers import EVERYTHING, assert_same_bits, bf16_normal, build_input, build_linear, every_dtype, forward_backward
from torch import nn

from quant.config import QuantConfig
from quant.hadamard import rotate
from quant.linear import quantize_, set_strength_, set_strengths_
from quant.rounding import over_blocks, weight_codes, weight_scale
from quant.soft import FIRST_TEMPERATURE, soft_codes, soft_share, temperature

LEVELS = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
U = torch.linspace(-3, 3, 601, dtype=torch.float64)
RECIPES = [
    {},
    {"weights": "absmean"},
    {"weights": "twn"},
    {"weights": "absmean", "granularity": "group", "group_size": 8},
    {"granularity": "row", "hadamard": "all"},
    {"activations": "none"},
    {"dead_zone_bias": 0.5},
]


def by_softmax(in_codes, tau):
    probabilities = torch.softmax(-((in_codes.unsqueeze(-1) - LEVELS.to(in_codes)) ** 2) / tau, dim=-1)
    return (probabilities * LEVELS.to(in_codes)).sum(-1)


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("tau", [1e-3, 0.02, 0.1, FIRST_TEMPERATURE, 1.0, 30.0])
def test_codes_are_expected_values_under_a_softmax_over_the_levels(tau):
    codes, _ = soft_codes(U, scalar(tau))
    torch.testing.assert_close(codes, by_softmax(U, tau), rtol=1e-12, atol=1e-14)
    single, _ = soft_codes(U.float(), scalar(tau, torch.float32))
    torch.testing.assert_close(single, codes.float(), rtol=1e-5, atol=2e-4 if tau < 0.01 else 1e-6)


@pytest.mark.parametrize("tau", [0.02, 0.1, FIRST_TEMPERATURE, 1.0, 30.0])
def test_slope_is_the_derivative(tau):
    """By central differences."""
    step = 1e-4 * tau
    _, slope = soft_codes(U, scalar(tau))
    differences = (by_softmax(U + step, tau) - by_softmax(U - step, tau)) / (2 * step)
    torch.testing.assert_close(slope, differences, rtol=1e-6, atol=1e-9)


def test_cold_codes_are_rounded_and_nothing_overflows():
    far = torch.tensor([0.0, 0.2, 0.49, 0.51, 1.0, 1e4, -0.51, -1e4, 0.5])
    for tau in (0.0, 1e-6, 1e-3):
        codes, slope = soft_codes(far, scalar(tau, torch.float32))
        assert codes[:-1].tolist() == pytest.approx([0, 0, 0, 1, 1, 1, -1, -1], abs=1e-8)
        assert torch.isfinite(codes).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("strength", "share", "tau"),
    [(0.0, 0.0, 1.0), (0.1, 0.5, 1.0), (0.2, 1.0, 1.0), (0.6, 1.0, 0.5), (0.9, 1.0, 0.125), (1.0, 1.0, 0.0)],
)
def test_a_fifth_blends_and_the_rest_hardens(strength, share, tau):
    assert float(soft_share(scalar(strength))) == pytest.approx(share, abs=1e-12)
    assert float(temperature(scalar(strength))) == pytest.approx(FIRST_TEMPERATURE * tau, abs=1e-12)


def test_the_first_temperature_is_the_closest_to_no_rounding():
    """For normal weights over their mean magnitude: a hundredth more or less is farther."""
    u = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-(u**2) / math.pi)  # variance pi / 2, and so a mean magnitude of 1

    def error(tau):
        return float(((by_softmax(u, tau) - u) ** 2 * density).sum())

    assert error(FIRST_TEMPERATURE) < min(error(FIRST_TEMPERATURE - 0.01), error(FIRST_TEMPERATURE + 0.01))


def soft_layer(config, dtype=torch.float32, bias=True):
    layer = build_linear(dtype, bias)
    quantize_(layer, config, rounding="softmax")
    return layer


@every_dtype
def test_strength_0_is_the_16_bit_weight_bit_for_bit(dtype):
    """While inputs are on their ramp, so that the layer computes with the blend."""
    both = [soft_layer(EVERYTHING, dtype), build_linear(dtype)]
    quantize_(both[1], EVERYTHING)
    for layer in both:
        set_strengths_(layer, [0.0], [0.5])
    assert_same_bits(*(forward_backward(layer, build_input(dtype)) for layer in both))


@every_dtype
@pytest.mark.parametrize("keys", RECIPES, ids=str)
@pytest.mark.parametrize("gradient", ["identity", "clipped"])
def test_strength_1_is_the_rounded_weight_bit_for_bit(dtype, keys, gradient):
    config = QuantConfig(include="", gradient=gradient, **keys)
    both = [soft_layer(config, dtype), build_linear(dtype)]
    quantize_(both[1], config)
    for strengths in ([1.0], [0.5]), ([1.0], [1.0]):
        for layer in both:
            set_strengths_(layer, *strengths)
        ours, theirs = (forward_backward(layer, build_input(dtype)) for layer in both)
        if config.hadamard == "all" and gradient == "identity":  # the gradient is rotated there and back
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(ours.pop("weight"), theirs.pop("weight"), rtol=tolerance, atol=tolerance)
        assert_same_bits(ours, theirs)


def reference(layer, config, strength):
    """The weight of a soft layer as a formula that autograd differentiates."""
    weight = layer.weight
    stored = weight + (weight.bfloat16().float() - weight).detach()  # what is rotated
    rotated = rotate(stored) if config.hadamard == "all" else weight
    with torch.no_grad():
        scale = weight_scale([rotated], config)
        moved = rotated.bfloat16().float() - rotated
    in_codes = (rotated.float() + moved) / over_blocks(scale.divisor, rotated.shape)
    soft = by_softmax(in_codes, float(temperature(scalar(strength)))) * over_blocks(scale.level, rotated.shape)
    soft = rotate(soft) if config.hadamard == "all" else soft
    return torch.lerp(weight, soft.to(weight.dtype), float(soft_share(scalar(strength))))


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("keys", RECIPES[:-2], ids=str)
def test_gradient_is_that_of_the_forward_pass(strength, keys):
    """Autograd through the written-out formula; the scale is a constant."""
    config = QuantConfig(include="", **(keys | {"activations": "none"}))
    layer, x = soft_layer(config), build_input()
    set_strength_(layer, strength)
    ours = forward_backward(layer, x)
    plain = build_linear()
    x = x.requires_grad_()
    y = F.linear(x, reference(plain, config, strength), plain.bias)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype))
    for name, expected in {"y": y.detach(), "x": x.grad, "weight": plain.weight.grad}.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(ours["weight"], forward_backward(build_linear(), build_input())["weight"], rtol=1e-2)


def test_a_clipped_gradient_is_clipped_on_the_ramp_too():
    open_, clipped = (soft_layer(QuantConfig(include="", gradient=gradient)) for gradient in ("identity", "clipped"))
    gradients = []
    for layer in (open_, clipped):
        set_strength_(layer, 0.6)
        gradients.append(forward_backward(layer, build_input())["weight"])
    scale = weight_scale([open_.weight], EVERYTHING)
    passes = (open_.weight.bfloat16().float() / scale.level).abs() <= 1
    assert 0 < passes.sum() < passes.numel()
    assert torch.equal(gradients[1], gradients[0] * passes)


def test_a_ramp_has_no_jump():
    """Weights move by less than the strength allows them to, up to the last steps, where those at thresholds jump."""
    weight = bf16_normal(64, 64, size=0.02)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = weight
    quantize_(layer, QuantConfig(include="", activations="none"), rounding="softmax")
    eye, seen = torch.eye(64), []
    for step in range(201):
        set_strength_(layer, step / 200)
        with torch.no_grad():
            seen.append(layer(eye).T)
    moved = torch.stack([(later - earlier).abs().mean() for earlier, later in pairwise(seen)])
    whole = (seen[-1] - seen[0]).abs().mean()
    assert torch.equal(seen[0], weight)
    assert float(moved.max()) < 0.03 * float(whole)


def test_nothing_more_is_saved_for_the_backward_pass_than_by_a_blend():
    def saved_by(rounding):
        layer, x = build_linear(bias=False), build_input().requires_grad_()
        quantize_(layer, EVERYTHING, rounding=rounding)
        set_strength_(layer, 0.5)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
            layer(x)
        return [(tensor.shape, tensor.dtype) for tensor in saved]

    assert saved_by("softmax") == saved_by("blend")


def test_a_whole_ramp_is_one_graph_with_the_results_of_eager_code():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    layer = soft_layer(QuantConfig(include="", weights="twn", activations="none"))
    compiled = copy.deepcopy(layer)
    compiled.compile(backend=counting, dynamic=False)
    for strength in (0.01, 0.2, 0.5, 0.99):
        set_strength_(layer, strength)
        set_strength_(compiled, strength)
        ours, theirs = forward_backward(compiled, build_input()), forward_backward(layer, build_input())
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def test_codes_of_a_soft_layer_are_those_of_the_recipe():
    layer = soft_layer(EVERYTHING)
    set_strength_(layer, 0.5)
    codes, level = layer.weight_codes()
    scale = weight_scale([layer.weight], EVERYTHING)
    assert torch.equal(codes, weight_codes(layer.weight, scale, EVERYTHING).to(torch.int8))
    assert torch.equal(level, scale.level)


@every_device
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("keys", RECIPES, ids=str)
def test_every_device_computes_the_same(device, strength, keys):
    found = []
    for where in (CPU, device):
        model = nn.ModuleDict({"down_proj": build_linear()}).to(where)
        quantize_(model, QuantConfig(include="", **keys), rounding="softmax")
        set_strength_(model, strength)
        found.append(forward_backward(model["down_proj"], build_input().to(where)))
    for name, expected in found[0].items():
        # An input on the other side of a tie moves by a whole step.
        assert (found[1][name].cpu() - expected).norm() <= 2e-2 * expected.norm(), name
