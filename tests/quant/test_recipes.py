"""Published recipes against the code of their authors, or against their formulas written out."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layers import I, O, bf16_normal, build_layer, outputs_and_gradients, preset
from places import ROOT, SUPPORT
from torch import nn

from model.init import initialize_
from model.transformer import ModelConfig, Transformer
from quant.config import PRESETS, QuantConfig
from quant.hadamard import rotate, rotate_weight
from quant.linear import add_learned_scales_, quantize_, set_strength_
from quant.rounding import bf16_values, first_alpha, quantize_weight


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
        before, after = model(tokens_BT).logits, model(changed).logits
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
        "import json, torch, tests.quant.test_recipes as t\n"
        "print(json.dumps([t.differences_from_torchao(d) for d in (torch.float32, torch.bfloat16)]))"
    )
    paths = [str(tmp_path), str(SUPPORT), str(ROOT)]
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
    with pytest.raises(ValueError, match="a width of 7 cannot be rotated; it must be even"):
        rotate(torch.ones(7))


def test_rotated_products_are_those_of_rotated_codes():
    layer, x = build_layer(preset("bitnet-v2")), bf16_normal(5, I, seed=12)
    codes, level = quantize_weight(rotate(layer.weight.detach()), QuantConfig(weights="absmean"))
    rotated = rotate(x)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    x_codes = (rotated * (127 / rotated.abs().amax(1, keepdim=True))).round()
    assert torch.equal(layer(x), (x_codes @ codes.T) * (scale * level[:, 0]))
    assert (layer(x) - x @ layer.weight.T).norm() < 0.6 * (x @ layer.weight.T).norm()


@pytest.mark.parametrize("name", ["quest", "bitnet-v2"])
def test_rotated_codes_are_the_same_whatever_is_computed_in(name):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(3)) * 0.02  # fp32, as masters are
    config, found = replace(PRESETS[name], include=""), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleDict({"o_proj": nn.Linear(256, 96, bias=False)})
        with torch.no_grad():
            model["o_proj"].weight.copy_(weight)
        quantize_(model.to(dtype), config)
        found[dtype] = model["o_proj"].weight_codes()
    (codes, level), (in_bf16, level_in_bf16) = found.values()
    assert torch.equal(codes, in_bf16)
    assert torch.equal(level, level_in_bf16)


def test_a_rotated_weight_has_the_gradient_of_the_rotation_alone():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad(rotate_weight(weight), weight, grad)
    assert torch.equal(found, rotate(grad))


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
        ({"weights": "absmax"}, r"is absmax; for ternary weights choose absmean, absmedian, twn, gaussian, learned"),
        ({"levels": "int4", "weights": "absmean"}, "is absmean; for int4 weights choose gaussian, absmax, learned"),
        ({"weights": "learned"}, "learned scales need granularity row"),
        ({"weights": "learned", "granularity": "row", "hadamard": "all"}, "learned scales need hadamard none"),
        ({"fused": True, "granularity": "row"}, "needs granularity matrix, not row"),
        ({"layer_norm": True, "activations": "none"}, "has no effect with activations none"),
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
        (QuantConfig(include="", hadamard="all"), "cannot rotate the 7 inputs of 0; the number must be even"),
        (preset("paretoq"), "0 has no weight_scale; call add_learned_scales_"),
    ],
)
def test_layers_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        quantize_(nn.Sequential(nn.Linear(7, 3)), config)
