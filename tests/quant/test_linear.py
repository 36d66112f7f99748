"""One quantized layer: its products, its gradients and both ends of the strength."""

import copy
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import (
    EVERYTHING,
    I,
    O,
    assert_same_bits,
    bf16_normal,
    build_input,
    build_layer,
    build_linear,
    dequantized,
    every_dtype,
    forward_backward,
)
from torch import nn

from quant.config import PRESETS, QuantConfig
from quant.integers import integer_product
from quant.kernels import avx2
from quant.linear import quantize_, set_strength_, set_strengths_
from quant.packed import freeze_
from quant.product import StraightThrough
from quant.rounding import quantize_activation, quantize_weight

HAS_AVX2 = torch.cpu._is_avx2_supported()
LOOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-5, "atol": 1e-5},  # the scales are fp32
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
CODE_CONFIGS = [
    {"weights": "absmean"},
    {"weights": "absmedian", "activations": "int8-128"},
    {"weights": "absmean", "activations": "int8-127.5"},
    {"weights": "twn"},
    {"weights": "gaussian", "granularity": "row"},
    {"weights": "absmean", "granularity": "group"},
    {"weights": "gaussian", "granularity": "group", "levels": "int4", "activations": "int4"},
    {"weights": "absmax", "granularity": "row", "levels": "int3"},
    {"weights": "gaussian", "levels": "int2"},
    {"weights": "absmean", "levels": "binary"},
]


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activations", ["int8", "none"])
def test_strength_0_is_the_plain_layer_bit_for_bit(dtype, bias, activations):
    layer, x = build_linear(dtype, bias), build_input(dtype)
    plain = forward_backward(layer, x)
    quantize_(layer, QuantConfig(include="", activations=activations))
    set_strength_(layer, 0.0)
    assert_same_bits(forward_backward(layer, x), plain)


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keys", CODE_CONFIGS, ids=str)
def test_strength_1_is_the_integer_product_bit_for_bit(dtype, bias, keys):
    """Sums of codes times codes as numpy has them in int64, then the scales in fp32, then the bias."""
    config = QuantConfig(include="", group_size=8, **keys)
    layer, x = build_linear(dtype, bias), build_input(dtype)
    weight_codes, level = quantize_weight(layer.weight.detach(), config)
    codes, scale = quantize_activation(x, config.activations)
    num_groups = level.shape[1]
    integers = np.einsum(
        "btgk,ogk->gbto",
        codes.unflatten(-1, (num_groups, -1)).long().numpy(),
        weight_codes.unflatten(-1, (num_groups, -1)).long().numpy(),
    )
    if num_groups == 1:
        expected = torch.from_numpy(integers[0]).float() * (scale * level[:, 0])
    else:
        expected = torch.zeros(3, 5, 10)
        for group in range(num_groups):
            expected += torch.from_numpy(integers[group]).float() * level[:, group]
        expected *= scale
    quantize_(layer, config)
    assert torch.equal(layer(x), expected.to(dtype) + layer.bias if bias else expected.to(dtype))


@every_dtype
@pytest.mark.parametrize("granularity", ["matrix", "row", "group"])
def test_strength_1_without_activations_is_the_product_with_codes(dtype, granularity):
    config = QuantConfig(include="", granularity=granularity, group_size=8, activations="none")
    layer, x = build_linear(dtype), build_input(dtype)
    weight, _ = dequantized(layer, x, config)
    quantize_(layer, config)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), **LOOSE[dtype])


@pytest.mark.parametrize("num_tokens", [1, 17, 64])
def test_integer_products_are_exact_on_every_path(num_tokens, monkeypatch):
    """int8 instructions, pairs added up in 16 bits, and fp32 give the integers of int64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (num_tokens, 4096), generator=generator, dtype=torch.int8)
    weight = torch.randint(-1, 2, (24, 4096), generator=generator, dtype=torch.int8)
    expected = (x.long() @ weight.long().T).float()
    monkeypatch.setattr("quant.integers.LEAST_IN_PAIRS", 0)
    for has_int8, has_pairs in ((True, False), (False, HAS_AVX2), (False, False)):
        monkeypatch.setattr("quant.integers.CPU_HAS_INT8", has_int8)
        monkeypatch.setattr("quant.integers.CPU_HAS_PAIRS", has_pairs)
        assert torch.equal(integer_product(x, weight), expected)
        assert torch.equal(integer_product(x, weight.T.contiguous().T), expected)
        half, of_half = x[:, ::2], weight[:, ::2]
        assert torch.equal(integer_product(half, of_half), (half.long() @ of_half.long().T).float())


@pytest.mark.skipif(not HAS_AVX2, reason="needs a CPU with AVX2")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_has_the_same_bits_whichever_way_it_multiplies(compiled, monkeypatch):
    """Forward, and backward with rounded gradients."""
    monkeypatch.setattr("quant.integers.CPU_HAS_INT8", False)
    monkeypatch.setattr("quant.integers.LEAST_IN_PAIRS", 0)
    pairs, words = (Mock(wraps=getattr(avx2, name)) for name in ("product_in_pairs", "product_in_words"))
    monkeypatch.setattr(avx2, "product_in_pairs", pairs)
    monkeypatch.setattr(avx2, "product_in_words", words)
    found, calls = [], []
    for has_pairs in (False, True):
        monkeypatch.setattr("quant.integers.CPU_HAS_PAIRS", has_pairs)
        monkeypatch.setattr("quant.integers.CPU_HAS_WORDS", has_pairs)
        layer = build_linear()
        quantize_(layer, QuantConfig(include="", backward="int8"))
        if compiled:
            torch._dynamo.reset()
            layer.compile(fullgraph=True)
        found.append(forward_backward(layer, build_input()))
        calls.append((pairs.call_count, words.call_count))
    assert_same_bits(*found)
    assert calls == [(0, 0), (2, 1)]


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_strength_blends_linearly(strength):
    config = QuantConfig(include="", activations="none")
    layer, x = build_linear(torch.float64), build_input(torch.float64)
    plain = layer(x)
    quantize_(layer, config)
    rounded = layer(x)
    set_strength_(layer, strength)
    strength = torch.tensor(strength).double()  # as fp32 holds it
    torch.testing.assert_close(layer(x), plain + strength * (rounded - plain), rtol=1e-6, atol=1e-6)


@every_dtype
def test_gradient_of_a_ramp_goes_straight_through(dtype):
    """It is that of the plain layer at the blended operands, passed on to the latent ones unchanged."""
    layer, x = build_linear(dtype), build_input(dtype)
    weight, rounded = dequantized(layer, x, EVERYTHING)
    blend = torch.tensor(0.3).to(dtype)
    at = copy.deepcopy(layer)
    at.weight.data = torch.lerp(layer.weight.data, weight, blend)
    expected = forward_backward(at, torch.lerp(x, rounded, blend))
    quantize_(layer, EVERYTHING)
    set_strength_(layer, 0.3)
    assert_same_bits(forward_backward(layer, x), expected)


@every_dtype
@pytest.mark.parametrize("keys", [*CODE_CONFIGS, {"activations": "none"}], ids=str)
def test_gradient_at_strength_1_goes_straight_through(dtype, keys):
    """It is that of the plain layer at the dequantized operands."""
    config = QuantConfig(include="", group_size=8, **keys)
    layer, x = build_linear(dtype), build_input(dtype)
    weight, rounded = dequantized(layer, x, config)
    at = copy.deepcopy(layer)
    at.weight.data = weight
    expected = forward_backward(at, rounded)
    quantize_(layer, config)
    ours = forward_backward(layer, x)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **LOOSE[dtype])


def test_straight_through_is_exact_at_both_ends():
    """The written-out `x + strength * (rounded - x)` is not."""
    x, rounded = torch.tensor([1e8, 0.1, -3.0]), torch.tensor([1.0, 0.3, 0.1])
    assert torch.equal(StraightThrough.apply(x, rounded, torch.tensor(0.0)), x)
    assert torch.equal(StraightThrough.apply(x, rounded, torch.tensor(1.0)), rounded)
    assert not torch.equal(x + 1.0 * (rounded - x), rounded)


def test_rounding_takes_no_gradient_where_none_is_wanted():
    layer, x = build_linear(), build_input()
    layer.weight.requires_grad_(False)
    quantize_(layer, EVERYTHING)
    assert layer(x).requires_grad  # the bias
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keys", [{}, {"granularity": "group", "group_size": 8}, {"backward": "int8"}], ids=str)
def test_a_vector_is_a_matrix_of_one_row_and_no_rows_give_none(keys, strength):
    layer, vector = build_layer(QuantConfig(include="", **keys), bias=True), bf16_normal(I)
    set_strength_(layer, strength)
    expected, found = (forward_backward(layer, x) for x in (vector[None], vector))
    for name in ("y", "x"):
        expected[name] = expected[name][0]
    assert_same_bits(found, expected)
    empty = forward_backward(layer, torch.empty(0, I))
    assert (empty["y"].shape, empty["x"].shape) == ((0, O), (0, I))
    assert not empty["weight"].any()
    if strength == 1:
        model = nn.ModuleDict({"down_proj": layer})
        freeze_(model)
        assert torch.equal(model["down_proj"](vector), expected["y"])
        assert model["down_proj"](torch.empty(0, I)).shape == (0, O)


def test_a_zero_matrix_and_a_zero_token_stay_finite():
    layer, x = build_linear(), build_input()
    nn.init.zeros_(layer.weight)
    x[0, 0] = 0
    quantize_(layer, EVERYTHING)
    result = forward_backward(layer, x)
    assert all(value.isfinite().all() for value in result.values())
    assert torch.equal(result["y"], layer.bias.detach().expand(3, 5, 10))


# What the module's docstring and `print` say


@pytest.mark.parametrize(
    ("config", "strengths", "shown"),
    [
        (QuantConfig(), (1, 1), "weights=gaussian, mode=codes, weight_strength=1, activation_strength=1"),
        (
            QuantConfig(levels="int2", granularity="row", weights="absmax"),
            (0, 0),
            "weights=absmax, levels=int2, granularity=row, mode=plain, weight_strength=0, activation_strength=0",
        ),
        (
            PRESETS["bitnet-b1.58"],
            (0.25, 0.5),
            "preset=bitnet-b1.58, mode=ramp, weight_strength=0.25, activation_strength=0.5",
        ),
        (
            replace(PRESETS["bitnet-v2"], activations="int4"),
            (0.1, 1),
            "preset=bitnet-v2, activations=int4, mode=ramp, weight_strength=0.1, activation_strength=1",
        ),
        (
            QuantConfig(activations="none"),
            (0.25, 0),
            "weights=gaussian, activations=none, mode=ramp, weight_strength=0.25",
        ),
    ],
)
def test_print_shows_recipe_mode_and_strengths(config, strengths, shown):
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    quantize_(model, replace(config, include="0"))
    set_strengths_(model, [strengths[0]], [strengths[1]])
    layer = f"QuantLinear(in_features=8, out_features=4, bias=False, {shown})"
    assert repr(model) == f"Sequential(\n  (0): {layer}\n)"


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_print_does_not_read_the_device_at_constant_strength(strength, monkeypatch):
    layer = build_linear()
    quantize_(layer, EVERYTHING)
    set_strength_(layer, strength)
    for read in ("tolist", "item", "__float__", "__format__"):
        monkeypatch.setattr(torch.Tensor, read, lambda *_: pytest.fail("reads a tensor"))
    assert f"weight_strength={strength:g}" in repr(layer)


def test_saved_for_backward_is_what_the_docstring_says():
    def saved_at(strength):
        layer, x = build_linear(bias=False), build_input(torch.float32).requires_grad_()
        quantize_(layer, EVERYTHING)
        set_strength_(layer, strength)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
            layer(x)
        own = {layer.weight.data_ptr(): "W", x.data_ptr(): "x"}
        return sorted(own.get(t.data_ptr(), f"{t.dtype} {t.numel()}") for t in saved if t is not None)

    x = build_input(torch.float32)
    assert saved_at(0.0) == ["W", "x"]
    assert saved_at(0.5) == sorted(["W", f"{torch.float32} {x.numel()}", *2 * [f"{torch.float32} 1"]])
    scales = [f"{torch.float32} {x[..., 0].numel()}", f"{torch.float32} 1"]
    assert saved_at(1.0) == sorted(["W", f"{torch.int8} {x.numel()}", *scales])
