"""Published recipes against the code of their authors, or against their formulas written out."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.init import initialize_
from model.transformer import ModelConfig, Transformer
from quant.config import PRESETS, SCALES_OF_LEVELS, QuantConfig
from quant.hadamard import rotate
from quant.linear import add_learned_scales_, quantize_, set_strength_
from quant.rounding import (
    GAUSSIAN_CLIP,
    LARGEST_CODE,
    bf16_values,
    dequantize,
    first_alpha,
    quantize_weight,
    weight_gradients,
)

I, O = 64, 24  # noqa: E741


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


def test_every_preset_is_valid_and_named():
    for name, config in PRESETS.items():
        assert config.preset == name
        assert build_layer(preset(name))(bf16_normal(3, I)).isfinite().all()


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", list(PRESETS))
def test_no_token_sees_a_later_one(name, strength):
    """A norm over the sequence, as the bitlinear package had before its version 2.4, would."""
    model = Transformer(
        ModelConfig(vocab_size=48, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, sub_norm=True)
    )
    initialize_(model, seed=0)
    config = preset(name, include=QuantConfig().include)
    if config.learned:
        add_learned_scales_(model, config)
    quantize_(model, config)
    set_strength_(model, strength)
    tokens_BT = torch.randint(0, 48, (1, 10), generator=torch.Generator().manual_seed(2))
    changed = tokens_BT.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 48
    with torch.no_grad():
        before, after = model(tokens_BT), model(changed)
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6], before[:, 6])


# The bitlinear package


@pytest.mark.parametrize("seed", range(4))
def test_nielsen_2025_is_the_bitlinear_package(seed):
    """Outputs and all gradients; its codes are computed with the very operations of ours."""
    bitlinear = pytest.importorskip("bitlinear")
    config = preset("nielsen-2025")
    layer, x = build_layer(config), bf16_normal(2, 5, I, seed=seed + 10)
    theirs = bitlinear.BitLinear(I, O, bias=False)
    theirs.weight.data.copy_(layer.weight.data)
    expected = outputs_and_gradients(theirs, x)
    ours = outputs_and_gradients(layer, x)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_bitlinear_divides_a_bias_by_the_scales_and_we_do_not():
    bitlinear = pytest.importorskip("bitlinear")
    layer, x = build_layer(preset("nielsen-2025"), bias=True), bf16_normal(5, I)
    theirs = bitlinear.BitLinear(I, O, bias=True)
    theirs.weight.data.copy_(layer.weight.data)
    theirs.bias.data.zero_()
    torch.testing.assert_close(layer(x), theirs(x) + layer.bias, rtol=1e-5, atol=1e-6)
    theirs.bias.data.copy_(layer.bias.data)
    assert (layer(x) - theirs(x)).abs().max() > 0.5


# torchao


def differences_from_torchao(dtype):
    """Norms of what differs, relative, of the output and both gradients. Runs where torchao can be imported."""
    from torchao.prototype.quantized_training.bitnet import bitnet_training
    from torchao.quantization import quantize_ as torchao_quantize_

    layer = build_layer(preset("bitnet-b1.58")).to(dtype)
    theirs = nn.Sequential(nn.Linear(I, O, bias=False, dtype=dtype))
    theirs[0].weight.data.copy_(layer.weight.data)
    torchao_quantize_(theirs, bitnet_training())
    x = bf16_normal(2, 5, I, seed=3).to(dtype)
    expected, ours = outputs_and_gradients(theirs, x), outputs_and_gradients(layer, x)
    expected["weight"] = torch.as_tensor(expected["0.weight"])
    return {
        name: float((ours[name].float() - expected[name].float()).norm() / expected[name].float().norm())
        for name in ("y", "x", "weight")
    }


@pytest.mark.slow
def test_bitnet_is_torchaos_layer(tmp_path):
    """In a process of its own: where torchao is installed Transformers imports it, with warnings."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "torchao==0.18.0"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("torchao 0.18.0 cannot be installed: no package index")
    code = (
        "import json, torch, test_quant_recipes as t\n"
        "print(json.dumps([t.differences_from_torchao(d) for d in (torch.float32, torch.bfloat16)]))"
    )
    paths = [str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    single, half = json.loads(result.stdout.splitlines()[-1])
    assert max(single.values()) < 1e-5
    assert max(half.values()) < 1e-2  # it rounds both scales to bf16, which moves 2.7 % of its int8 codes by one


# ParetoQ: the formulas of arXiv 2502.02631, eq. 2 to 4, and of LSQ, written out


def pareto_forward_and_gradients(weight, alpha, grad, levels):
    """Dequantized weight, gradient by the weight and by alpha, in float64."""
    a, w, g = (t.double() for t in (alpha[:, None], weight, grad))
    u = w / a
    if levels in ("ternary", "int2"):
        n, shift = {"ternary": (1.5, 0.0), "int2": (2.0, 0.5)}[levels]
        q = ((u.clamp(-0.99, 0.99) * n - shift).round() + shift) / n
        low, high, most = u < -0.99, u > 0.99, (n - shift) / n
        least, positive = -most, 1
    else:
        least, most = {"int3": (-4, 3), "int4": (-8, 7)}[levels]
        q = u.round().clamp(least, most)
        low, high, positive = u < least, u > most, most
    middle = ~(low | high)
    slope = low * least + high * most + middle * (q - u)
    return q * a, middle * g, (slope * g).sum(1) / math.sqrt(w.numel() * positive)


@pytest.mark.parametrize("levels", ["ternary", "int2", "int3", "int4"])
@pytest.mark.parametrize("shrink", [1.0, 0.4])
def test_learned_scales_are_paretoqs(levels, shrink):
    """With alphas as they begin, and smaller, where weights are clipped."""
    config = preset("paretoq", levels=levels)
    weight = bf16_normal(O, I, size=0.02)
    alpha = bf16_values(first_alpha(weight.abs().amax(1), levels) * shrink)
    layer, x = build_layer(config, alpha=alpha), bf16_normal(7, I, seed=4)
    ours = outputs_and_gradients(layer, x)
    grad_y = bf16_normal(7, O, seed=7)
    rounded, grad_weight, grad_alpha = pareto_forward_and_gradients(weight, alpha, grad_y.T @ x, levels)
    torch.testing.assert_close(ours["y"], x @ rounded.float().T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["x"], grad_y @ rounded.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["weight"], grad_weight.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["weight_scale"], grad_alpha.float(), rtol=1e-4, atol=1e-5)


def test_learned_scales_follow_the_loss():
    """Descending along alpha's gradient alone brings the product nearer to a target."""
    layer, x = build_layer(preset("paretoq")), bf16_normal(64, I)
    target = x @ layer.weight.detach().T
    optimizer = torch.optim.Adam([layer.weight_scale], lr=1e-3)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Scales


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


@settings(deadline=None, max_examples=60)
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
    step = dequantize(torch.ones_like(weight), level)
    nearest = (weight[..., None] - step[..., None] * grid).abs().min(-1).values
    assert ((weight - codes * step).abs() <= nearest + 1e-6 * step).all()


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


# Gradients of rounding


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


# Rotation, dead zone, fused scales


@pytest.mark.parametrize("width", [2, 24, 128, 256, 1536, 5632])
def test_rotations_are_orthogonal_and_undo_themselves(width):
    x = bf16_normal(3, width, seed=11).double()
    rotated = rotate(x)
    torch.testing.assert_close(rotate(rotated), x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(rotated, x)


def test_a_rotation_spreads_an_outlier():
    x = torch.zeros(1, 256)
    x[0, 17] = 16.0
    torch.testing.assert_close(rotate(x).abs(), torch.ones(1, 256))


def test_an_odd_width_cannot_be_rotated():
    with pytest.raises(ValueError, match="a width of 7 cannot be rotated: it is odd"):
        rotate(torch.ones(7))


def test_rotated_products_are_those_of_rotated_codes():
    layer, x = build_layer(preset("bitnet-v2")), bf16_normal(5, I, seed=12)
    codes, level = quantize_weight(rotate(layer.weight.detach()), QuantConfig(weights="absmean"))
    rotated = rotate(x)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    x_codes = (rotated * (127 / rotated.abs().amax(1, keepdim=True))).round()
    assert torch.equal(layer(x), (x_codes @ codes.T) * (scale * level[:, 0]))
    assert (layer(x) - x @ layer.weight.T).norm() < 0.6 * (x @ layer.weight.T).norm()


def test_dead_weights_add_their_share_and_get_a_gradient_of_their_own():
    config = QuantConfig(include="", dead_zone_bias=1e-3)
    layer, x = build_layer(config), bf16_normal(5, I, seed=13)
    plain = build_layer(QuantConfig(include=""))
    dead = quantize_weight(layer.weight.detach())[0] == 0
    bias = 1e-3 * (layer.weight.detach() * dead).sum(1)
    ours, without = outputs_and_gradients(layer, x), outputs_and_gradients(plain, x)
    torch.testing.assert_close(ours["y"], without["y"] + bias)
    own = 1e-3 * dead * bf16_normal(5, O, seed=7).sum(0)[:, None]
    torch.testing.assert_close(ours["weight"], without["weight"] + own)


def test_fused_projections_share_one_scale():
    parts = nn.ModuleDict({name: nn.Linear(I, O, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    for index, layer in enumerate(parts.values()):
        layer.weight.data = bf16_normal(O, I, seed=index, size=0.01 * (index + 1))
    quantize_(parts, QuantConfig(include="", weights="absmedian", fused=True))
    fused = torch.cat([parts[name].weight.detach() for name in ("q_proj", "k_proj", "v_proj")])
    codes, level = quantize_weight(fused, QuantConfig(weights="absmedian"))
    ours = [parts[name].weight_codes() for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat([part_codes for part_codes, _ in ours]).float(), codes)
    assert all(torch.equal(part_level, level) for _, part_level in ours)
    alone = quantize_weight(parts["o_proj"].weight, QuantConfig(weights="absmedian"))[1]
    assert torch.equal(parts["o_proj"].weight_codes()[1], alone)


# Errors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "absmax"}, r"is absmax; ternary weights take absmean, absmedian, twn, gaussian, learned"),
        ({"levels": "int4", "weights": "absmean"}, "is absmean; int4 weights take gaussian, absmax, learned"),
        ({"weights": "learned"}, "learned scales belong to a row each"),
        ({"weights": "learned", "granularity": "row", "hadamard": "all"}, "rows that are not rotated"),
        ({"fused": True, "granularity": "row"}, "shared with no other matrix anyway"),
        ({"layer_norm": True, "activations": "none"}, "which are none"),
        ({"dead_zone_bias": -1.0}, "must be 0 or more"),
        ({"dead_zone_bias": 0.1, "levels": "binary"}, "no dead zone"),
        ({"group_size": 1}, "must be 2 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**keys)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(include="", granularity="group"), "group_size 128 does not divide the 7 inputs of 0"),
        (QuantConfig(include="", hadamard="all"), "cannot rotate the 7 inputs of 0, an odd number"),
        (preset("paretoq"), "0 has no weight_scale: call add_learned_scales_"),
    ],
)
def test_layers_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        quantize_(nn.Sequential(nn.Linear(7, 3)), config)
