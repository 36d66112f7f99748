"""The 8-bit backward pass: exact integer products of rounded gradients, within what rounding can change."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import EVERYTHING, build_input, build_linear, every_dtype, forward_backward
from torch import Tensor, nn

import quant.integers
from quant.config import QuantConfig
from quant.integers import EXACT_IN_FP32, integer_sums
from quant.linear import quantize_
from quant.rounding import quantize_activation, quantize_rows, quantize_weight

ULPS = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float64: 2**-22}
"""What the scales and the result's dtype may change, relative to the largest part of a sum."""


def rounded_rows(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows in 8 bits, by numpy in fp64; a tie may go either way in fp32, so the result is only near."""
    wide = x.double().numpy()
    scale = np.abs(wide).max(-1, keepdims=True) / 127
    return np.round(wide / np.where(scale == 0, 1, scale)), scale


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from([1e-20, 1e-6, 1.0, 1e6]))
def test_rows_are_rounded_by_their_largest_magnitude(rows: int, width: int, size: float) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)) * size
    codes, scale = quantize_rows(x)
    expected, expected_scale = rounded_rows(x)
    assert codes.dtype == torch.int8
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-6)
    assert np.abs(codes.numpy() - expected).max() <= 1
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()


def test_rows_of_zeros_stay_zeros() -> None:
    codes, scale = quantize_rows(torch.zeros(2, 5))
    assert not codes.any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("path", ["int8", "words", "words without a compiler", "fp32"])
@pytest.mark.parametrize("num_tokens", [1, 8, 1031, 1032, 1033, 1040, 5000])
def test_sums_over_tokens_are_exact_on_every_path(num_tokens: int, path: str, monkeypatch) -> None:
    """Also where one sum would not fit fp32, or, in pieces, int32."""
    if path == "words" and not torch.cpu._is_avx2_supported():
        pytest.skip("needs a CPU with AVX2")
    monkeypatch.setattr(quant.integers, "CPU_HAS_INT8", path == "int8")
    monkeypatch.setattr(quant.integers, "CPU_HAS_WORDS", path.startswith("words"))
    monkeypatch.setattr(quant.integers, "LEAST_IN_PAIRS", 0)
    monkeypatch.setattr(quant.integers, "EXACT_IN_INT32", 2048)
    if path == "words without a compiler":
        monkeypatch.setattr("quant.kernels.avx2.library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(120, 128, (24, num_tokens), generator=generator, dtype=torch.int8)
    right = torch.randint(120, 128, (num_tokens, 16), generator=generator, dtype=torch.int8)
    right[:, ::2] = -128  # of inputs that are rounded as int8-128 or int8-127.5
    assert torch.equal(integer_sums(left, right), (left.long() @ right.long()).float())


def test_the_longest_sum_in_fp32_has_room_for_the_largest_codes() -> None:
    assert EXACT_IN_FP32 * 127 * 128 < 2**24


@every_dtype
@pytest.mark.parametrize("granularity", ["matrix", "row"])
@pytest.mark.parametrize("backward", ["int8-input", "int8"])
def test_gradients_differ_by_no_more_than_rounding(dtype, granularity, backward) -> None:
    """Each rounded gradient is off by half a step at most, and a sum by that times the codes that it goes through."""
    config = replace(EVERYTHING, granularity=granularity)
    exact_layer, x = build_linear(dtype), build_input(dtype)
    quantize_(exact_layer, config)
    exact = forward_backward(exact_layer, x)
    layer = build_linear(dtype)
    quantize_(layer, replace(config, backward=backward))
    found = forward_backward(layer, x)
    assert torch.equal(found["y"], exact["y"])
    assert torch.equal(found["bias"], exact["bias"])

    codes_OI, level = (t.double() for t in quantize_weight(layer.weight.detach(), config))
    codes_NI, scale_N1 = (t.flatten(0, -2).double() for t in quantize_activation(x))
    grad_NO = torch.linspace(-1, 1, found["y"].numel(), dtype=torch.float64).view(-1, 10).to(dtype).double()
    ulp = ULPS[dtype]

    step_N1 = (grad_NO * level[:, 0]).abs().amax(1, keepdim=True) / 127
    bound = step_N1 / 2 * codes_OI.abs().sum(0) * 1.001 + ulp * (grad_NO.abs() @ (codes_OI * level).abs())
    error = (found["x"] - exact["x"]).flatten(0, -2).double().abs()
    assert (error <= bound).all()
    assert error.any()

    error = (found["weight"] - exact["weight"]).double().abs()
    if backward == "int8-input":
        assert not error.any()
        return
    step_O1 = (grad_NO * scale_N1).abs().amax(0)[:, None] / 127
    bound = step_O1 / 2 * codes_NI.abs().sum(0) * 1.001 + ulp * (grad_NO.abs().T @ (codes_NI * scale_N1).abs())
    assert (error <= bound).all()
    assert error.any()


@every_dtype
def test_gradients_are_the_integer_products(dtype) -> None:
    """Of codes as numpy multiplies them in int64."""
    config = replace(EVERYTHING, backward="int8")
    layer, x = build_linear(dtype), build_input(dtype)
    quantize_(layer, config)
    found = forward_backward(layer, x)
    codes_OI, level = quantize_weight(layer.weight.detach(), config)
    codes_NI, scale_N1 = (t.flatten(0, -2) for t in quantize_activation(x))
    grad_NO = torch.linspace(-1, 1, found["y"].numel(), dtype=torch.float64).view(-1, 10).to(dtype)
    rows, row_scale = quantize_rows(grad_NO * level[:, 0])
    expected = torch.from_numpy(rows.long().numpy() @ codes_OI.long().numpy()).float() * row_scale
    assert torch.equal(found["x"].flatten(0, -2), expected.to(dtype))
    columns, column_scale = quantize_rows((grad_NO * scale_N1).T)
    expected = torch.from_numpy(columns.long().numpy() @ codes_NI.long().numpy()).float() * column_scale
    assert torch.equal(found["weight"], expected.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backward", ["int8-input", "int8"])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad: float, backward: str) -> None:
    layer, x = build_linear(), build_input().requires_grad_()
    quantize_(layer, replace(EVERYTHING, backward=backward))
    grad = torch.ones(3, 5, 10)
    grad[1, 2, 3] = bad
    layer(x).backward(grad)
    assert not x.grad[1, 2].isfinite().any()
    assert x.grad[0].isfinite().all()
    assert not layer.weight.grad[3].isfinite().any()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"backward": "int8", "activations": "none"}, "choose int8-input"),
        ({"backward": "int8-input", "granularity": "group"}, "with granularity group choose exact"),
    ],
)
def test_what_has_no_codes_to_multiply_is_refused(keys, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        QuantConfig(**keys)


def test_activations_in_16_bits_leave_the_weight_gradient_exact() -> None:
    config = replace(EVERYTHING, activations="none")
    layers = [nn.Linear(24, 10), nn.Linear(24, 10)]
    layers[1].load_state_dict(layers[0].state_dict())
    quantize_(layers[0], config)
    quantize_(layers[1], replace(config, backward="int8-input"))
    exact, found = (forward_backward(layer, build_input()) for layer in layers)
    assert torch.equal(found["weight"], exact["weight"])
    assert not torch.equal(found["x"], exact["x"])
