"""Quantized layers on a GPU: the CPU's codes and integers, and the same bits whichever way they are computed."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from layers import bf16_normal, preset
from models import TINY, build, random_tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from quant.config import BITNET, PRESETS, QuantConfig
from quant.linear import add_learned_scales_, quantize_, quantized_layers, set_strength_
from quant.packed import freeze_
from quant.rounding import (
    bf16_values,
    first_alpha,
    magnitude_counts,
    quantize_activation,
    scale_from_counts,
    scale_from_sums,
    scale_sums,
    weight_codes,
    weight_scale,
)
from quant.telemetry import Probe

pytestmark = pytest.mark.gpu

RECIPES = {
    "default": QuantConfig(include=""),
    **{name: preset(name) for name in PRESETS},
    "row": QuantConfig(include="", granularity="row"),
    "group": QuantConfig(include="", granularity="group", group_size=8),
    "twn": QuantConfig(include="", weights="twn"),
    "binary": QuantConfig(include="", levels="binary"),
    "int2": QuantConfig(include="", levels="int2", weights="absmax"),
    "int4": QuantConfig(include="", levels="int4"),
    "dead-zone": QuantConfig(include="", dead_zone_bias=1e-3),
    "127.5": QuantConfig(include="", activations="int8-127.5"),
}
every_recipe = pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CPU, GPU = "cpu", "cuda"
SIZES = {"integer units": (256, 192), "no integer units": (264, 102)}  # their products take widths that 8 divides


def is_exact(config):
    """Whether inputs are rounded as they come, without sums before it, whose order differs between devices."""
    return not config.layer_norm and config.hadamard == "none"


def layer_on(device, config, dtype, in_features=256, out_features=192, bias=True):
    layer = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(0.02 * torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)))
        if bias:
            layer.bias.copy_(bf16_normal(out_features, seed=1))
    layer = layer.to(device, dtype)
    model = nn.ModuleDict({"down_proj": layer})
    if config.learned:
        add_learned_scales_(model, config)
        with torch.no_grad():
            layer.weight_scale.copy_(first_alpha(layer.weight.abs().amax(1), config.levels))
    quantize_(model, config)
    return model


def inputs(dtype, width=256):
    return torch.randn(5, 9, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model["down_proj"](x)
    y.backward(bf16_normal(*y.shape, seed=7).to(y))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def relative_error(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


@every_dtype
@every_recipe
def test_codes_are_those_of_the_cpu(config, dtype):
    layer, same = (layer_on(device, config, dtype)["down_proj"] for device in (GPU, CPU))
    codes_OI, level = layer.weight_codes()
    expected_OI, expected_level = same.weight_codes()
    torch.testing.assert_close(level.cpu(), expected_level, rtol=1e-6, atol=0)
    if config.hadamard == "none":
        assert torch.equal(codes_OI.cpu(), expected_OI)
        # The scale of one device on the other: nothing is left to differ.
        scale = same.rounding_scale(same.rotated_weight())
        moved = type(scale)(*(part if part is None else part.to(GPU) for part in scale))
        assert torch.equal(weight_codes(layer.weight, moved, config).cpu(), expected_OI.float())
    else:
        assert (codes_OI.cpu() != expected_OI).float().mean() < 1e-3
    if config.activations == "none":
        return
    x = inputs(dtype)
    codes, scale = layer.input_codes(x.to(GPU))
    expected, expected_scale = same.input_codes(x)
    if is_exact(config):
        assert torch.equal(codes.cpu(), expected)
        assert torch.equal(scale.cpu(), expected_scale)
    else:
        assert (codes.cpu() != expected).float().mean() < (1e-3 if dtype == torch.float32 else 1e-2)
        assert (codes.cpu().int() - expected.int()).abs().max() <= 1


def test_codes_are_those_of_the_bf16_cast():
    """In fp32 too, where another rounding would change some."""
    config = QuantConfig(include="")
    layer = layer_on(GPU, config, torch.float32, 1024, 1024)["down_proj"]
    codes_OI, level = layer.weight_codes()
    level, weight_OI = level.cpu(), layer.weight.detach().cpu()
    expected_OI = (weight_OI.bfloat16().float() * level.reciprocal()).round().clamp(-1, 1)
    assert torch.equal(codes_OI.cpu().float(), expected_OI)
    assert not torch.equal((weight_OI * level.reciprocal()).round().clamp(-1, 1), expected_OI)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_dtype
@every_recipe
def test_outputs_are_products_of_integers(config, dtype, size):
    if config.granularity == "group" or config.activations == "none":
        pytest.skip("not one product of integers")
    layer = layer_on(GPU, config, dtype, *size)["down_proj"]
    x = inputs(dtype, size[0])
    codes, scale = (tensor.cpu() for tensor in layer.input_codes(x.to(GPU)))
    codes_OI, level = (tensor.cpu() for tensor in layer.weight_codes())
    product = (codes.flatten(0, 1).long() @ codes_OI.long().T).float() * (scale.flatten(0, 1) * level[:, 0])
    expected = product.to(dtype).view(5, 9, -1) + layer.bias.detach().cpu()
    if config.dead_zone_bias:
        expected = expected + layer.dead_zone().cpu().to(dtype)
    assert torch.equal(layer(x.to(GPU)).cpu(), expected)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@every_dtype
@every_recipe
def test_outputs_and_gradients_are_near_those_of_the_cpu(config, dtype, strength):
    results = []
    for device in (CPU, GPU):
        model = layer_on(device, config, dtype)
        set_strength_(model, strength)
        results.append(outputs_and_gradients(model, inputs(dtype).to(device)))
    # An input on the other side of a tie moves by a whole step, so that what is not exact is less near.
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] if is_exact(config) else 2e-2
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) < limit, name


@every_dtype
@pytest.mark.parametrize("granularity", ["matrix", "row"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_an_8_bit_backward_pass_has_the_bits_of_the_cpu(size, granularity, dtype):
    """Gradients are rounded row by row, and the sums are of integers."""
    config = QuantConfig(include="", granularity=granularity, backward="int8")
    results = []
    for device in (CPU, GPU):
        model = layer_on(device, config, dtype, *size, bias=False)
        with torch.no_grad():  # weights whose squares add up without rounding, in whatever order
            model["down_proj"].weight.mul_(256).round_().div_(256)
        results.append(outputs_and_gradients(model, inputs(dtype, size[0]).to(device)))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name].cpu(), expected), name


@every_dtype
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_strength_0_is_the_16_bit_model_bit_for_bit(name, dtype):
    model = build(replace(TINY, num_kv_heads=2, sub_norm=True)).to(GPU, dtype)
    tokens_BT = random_tokens(3, 20).to(GPU)
    config = QuantConfig() if name is None else PRESETS[name]
    if config.learned:
        add_learned_scales_(model, config)
    expected = gradients_of(model, tokens_BT)
    quantize_(model, config)
    changed = gradients_of(model, tokens_BT)
    set_strength_(model, 0)
    found = gradients_of(model, tokens_BT)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(changed["loss"], expected["loss"])


def gradients_of(model, tokens_BT):
    model.zero_grad()
    loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:]).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), "logits": model(tokens_BT).logits.detach(), **found}


@every_dtype
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("int")])
def test_a_frozen_model_computes_the_same_bits(name, dtype):
    """Rows that no 4 divides, biases, and fewer rows of inputs than the integer units take."""
    config = replace(RECIPES[name], include=BITNET.include)
    width = 54 if config.granularity != "group" else 56
    model = build(replace(TINY, num_kv_heads=2, intermediate_size=width, qkv_bias=True)).to(GPU, dtype)
    if config.learned:
        for parameter in add_learned_scales_(model, config):
            model.get_parameter(parameter).data.uniform_(0.02, 0.05)
    quantize_(model, config)
    frozen = deepcopy(model)
    freeze_(frozen)
    for num_tokens in (1, 5, 20):
        tokens_BT = random_tokens(2, num_tokens).to(GPU)
        with torch.no_grad():
            assert torch.equal(frozen(tokens_BT).logits, model(tokens_BT).logits)


@pytest.mark.parametrize(("in_features", "out_features"), [(6912, 2560), (2560, 6912), (2048, 8192)])
def test_wide_frozen_layers_compute_the_same_bits(in_features, out_features):
    model = layer_on(GPU, QuantConfig(include=""), torch.bfloat16, in_features, out_features)
    x = inputs(torch.bfloat16, in_features).to(GPU)
    expected = model["down_proj"](x)
    freeze_(model)
    assert torch.equal(model["down_proj"](x), expected)


@pytest.mark.parametrize("weights", ["absmean", "gaussian", "absmedian"])
def test_ranks_find_the_scale_of_the_whole_matrix(weights):
    config = QuantConfig(weights=weights)
    weight_OI = 0.02 * torch.randn(1000, 1300, generator=torch.Generator().manual_seed(0)).to(GPU)
    expected = weight_scale([weight_OI], config).level
    for num_ranks in (1, 2, 3, 7):
        if weights == "absmedian":
            counts = torch.stack([magnitude_counts(rows) for rows in weight_OI.chunk(num_ranks)]).sum(0)
            found = scale_from_counts(counts, config).level
        else:
            sums_O = torch.cat([scale_sums(rows, config) for rows in weight_OI.chunk(num_ranks)])
            found = scale_from_sums(sums_O, 1300, config).level
        assert torch.equal(found, expected), num_ranks


# Compiled


@every_dtype
@every_recipe
def test_a_compiled_layer_rounds_like_an_eager_one(config, dtype):
    """At full strength the output is one product of integers: another code would be another output."""
    torch._dynamo.reset()
    layer = layer_on(GPU, config, dtype, 1024, 1024, bias=False)
    compiled = deepcopy(layer)
    compiled["down_proj"].compile(fullgraph=True)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3)).to(GPU, dtype)
    expected, found = outputs_and_gradients(layer, x), outputs_and_gradients(compiled, x)
    if config.granularity == "group" or config.activations == "none" or not is_exact(config):
        assert relative_error(found["y"], expected["y"]) < (1e-5 if dtype == torch.float32 else 1e-2)
    else:
        torch.testing.assert_close(found["y"], expected["y"], rtol=3e-7 if dtype == torch.float32 else 8e-3, atol=1e-6)
    for name in expected:
        assert relative_error(found[name], expected[name]) < (1e-5 if dtype == torch.float32 else 1e-2), name


def rounded(weight_OI, x):
    config = QuantConfig()
    codes, scale = quantize_activation(x)
    return bf16_values(weight_OI), weight_codes(weight_OI, weight_scale([weight_OI], config), config), codes, scale


def test_compiled_rounding_is_bit_for_bit_that_of_eager():
    torch._dynamo.reset()
    weight_OI = 0.02 * torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).to(GPU)
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1)).to(GPU)
    expected, found = rounded(weight_OI, x), torch.compile(rounded, fullgraph=True)(weight_OI, x)
    names = ("bf16 cast", "weight codes", "input codes", "input scale")
    differing = {name: (ours != theirs).sum().item() for name, ours, theirs in zip(names, found, expected, strict=True)}
    assert differing == dict.fromkeys(names, 0)


def test_compiled_blocks_have_one_graph_for_each_mode():
    torch._dynamo.reset()
    model = build(replace(TINY, num_kv_heads=2, sub_norm=True)).to(GPU, torch.bfloat16)
    quantize_(model, QuantConfig())
    compiled = deepcopy(model)
    counter = CompileCounterWithBackend("inductor")
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend=counter)
    tokens_BT = random_tokens(3, 20).to(GPU)
    for strength in (0.0, 0.1, 0.5, 0.999, 1.0):
        losses = []
        for each in (model, compiled):
            set_strength_(each, strength)
            loss = each(tokens_BT[:, :-1], tokens_BT[:, 1:]).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-2), strength
    assert counter.frame_count == 3


# Telemetry


def test_the_figures_of_a_probe_are_those_of_the_cpu():
    measured = []
    for device in (CPU, GPU):
        model = layer_on(device, QuantConfig(include=""), torch.float32)
        layers = list(quantized_layers(model).values())
        probe = Probe(layers, [(0, layer.weight.numel()) for layer in layers])
        for step in range(3):
            probe.attach(measure=True, compare_next=True)
            with torch.no_grad():
                model["down_proj"](inputs(torch.float32).to(device))
                layers[0].weight.mul_(1 + 0.1 * step).add_(1e-3)
            found = probe.detach()
        measured.append(found)
    expected, found = measured
    assert found.has_flips
    assert found.figures.device.type == GPU
    torch.testing.assert_close(found.figures.cpu(), expected.figures, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sums.cpu(), expected.sums, rtol=1e-4, atol=0)
    assert torch.equal(found.flip_counts.cpu(), expected.flip_counts)
    assert (found.distances.cpu() - expected.distances).abs().max() <= 1e-4 * expected.distances.sum()
