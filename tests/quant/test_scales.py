"""Scales of codes: their errors on Gaussian weights, thresholds, groups."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import bf16_normal

from quant.config import SCALES_OF_LEVELS, QuantConfig
from quant.rounding import (
    GAUSSIAN_CLIP,
    LARGEST_CODE,
    LEARNED,
    SMALLEST_SCALE,
    dequantize,
    learned_scale,
    quantize_weight,
)


def gaussian_mse(levels, clip):
    """Relative squared error of a symmetric uniform quantizer on a standard normal variable, by integration."""
    x = np.linspace(-8, 8, 160_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    largest = LARGEST_CODE[levels]
    codes = np.arange(-largest, largest + 1, 1 if levels == "ternary" else 2)
    distances = np.abs(x[:, None] - codes * clip / largest)
    return float((distances.min(1) ** 2 * density).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("levels", list(GAUSSIAN_CLIP))
def test_gaussian_levels_have_the_least_error(levels):
    best = gaussian_mse(levels, GAUSSIAN_CLIP[levels])
    for factor in (0.99, 1.01):
        assert gaussian_mse(levels, GAUSSIAN_CLIP[levels] * factor) > best


@pytest.mark.parametrize(
    ("weights", "error", "zeros"),
    [("absmedian", 0.318, 0.26), ("absmean", 0.263, 0.31), ("gaussian", 0.190, 0.46), ("twn", 0.192, 0.42)],
)
def test_errors_and_zeros_on_a_gaussian(weights, error, zeros):
    """Relative squared error and share of zeros, as integration gives them."""
    weight = bf16_normal(512, 2048, seed=1)
    codes, level = quantize_weight(weight, QuantConfig(weights=weights))
    relative = (dequantize(codes, level) - weight).square().sum() / weight.square().sum()
    assert relative.item() == pytest.approx(error, abs=0.003)
    assert (codes == 0).float().mean().item() == pytest.approx(zeros, abs=0.007)


@settings(max_examples=60)
@given(
    st.sampled_from([(levels, scale) for levels, scales in SCALES_OF_LEVELS.items() for scale in scales]),
    st.sampled_from(["matrix", "row", "group"]),
    st.integers(0, 1000),
)
def test_each_code_is_the_nearest_level(kind, granularity, seed):
    """No other level is nearer; but for TWN, whose threshold is its own, and learned levels, which are no statistic."""
    levels, scale = kind
    if scale in ("learned", "twn"):
        return
    config = QuantConfig(levels=levels, weights=scale, granularity=granularity, group_size=8)
    weight = bf16_normal(6, 16, seed=seed)
    codes, level = quantize_weight(weight, config)
    grid = torch.arange(-LARGEST_CODE[levels], LARGEST_CODE[levels] + 1, 1 if levels == "ternary" else 2)
    assert torch.isin(codes, grid.float()).all()
    step, weight = dequantize(torch.ones_like(weight), level).double(), weight.double()
    nearest = (weight[..., None] - step[..., None] * grid).abs().min(-1).values
    # Half-way between two levels, the rounding of weight / step in fp32 decides.
    assert ((weight - codes * step).abs() <= nearest + 2**-22 * weight.abs()).all()


def test_twn_has_the_threshold_and_the_level_of_its_paper():
    weight = bf16_normal(8, 32, seed=2)
    codes, level = quantize_weight(weight, QuantConfig(weights="twn"))
    beyond = weight.abs() > 0.7 * weight.abs().mean()
    assert torch.equal(codes, weight.sign() * beyond)
    torch.testing.assert_close(level, weight.abs()[beyond].mean().view(1, 1))
    for other in (0.99, 1.01):  # least squares
        error, worse = ((codes * level * factor - weight).square().sum() for factor in (1.0, other))
        assert worse > error


def test_a_scale_does_not_depend_on_the_number_of_threads():
    weight = bf16_normal(512, 1024, seed=3)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append([quantize_weight(weight, QuantConfig(weights=w))[1] for w in ("absmean", "gaussian", "twn")])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_groups_are_quantized_each_alone():
    weight = bf16_normal(6, 16, seed=5)
    config = QuantConfig(granularity="group", group_size=4)
    codes, level = quantize_weight(weight, config)
    for row in range(6):
        for group in range(4):
            part = weight[row, 4 * group : 4 * group + 4]
            alone_codes, alone_level = quantize_weight(part[None], QuantConfig())
            assert torch.equal(codes[row, 4 * group : 4 * group + 4], alone_codes[0])
            assert level[row, group] == alone_level


@pytest.mark.parametrize("levels", sorted(LEARNED))
def test_a_row_whose_learned_scale_has_crossed_0_gets_a_gradient_that_brings_it_back(levels):
    alpha_O = torch.tensor([-0.05, 0.0, 1e-7, 0.0371], requires_grad=True)
    scale = learned_scale(alpha_O, levels)
    assert scale.level[:3].flatten().tolist() == [pytest.approx(SMALLEST_SCALE)] * 3
    scale.level.sum().backward()
    assert alpha_O.grad.tolist() == [pytest.approx(LEARNED[levels].unit)] * 4


@pytest.mark.parametrize("levels", sorted(LEARNED))
def test_master_copies_of_learned_scales_give_the_scales_of_training_in_bf16(levels):
    alpha_O = torch.rand(1000) / 10
    assert torch.equal(learned_scale(alpha_O, levels).level, learned_scale(alpha_O.bfloat16(), levels).level)
    assert not torch.equal(alpha_O, alpha_O.bfloat16().float())
