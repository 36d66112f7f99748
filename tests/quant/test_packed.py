"""Frozen layers against the layers that they replace: the same bits."""

from copy import deepcopy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from models import TINY, build, random_tokens
from torch import nn

from quant.config import BITNET, PRESETS, QuantConfig
from quant.integers import activation_codes, integer_product
from quant.kernels import avx2
from quant.linear import add_learned_scales_, quantize_, quantized_layers, set_strength_
from quant.packed import PackedLinear, freeze_, memory_bytes

RECIPES = {
    **PRESETS,
    "row": replace(BITNET, granularity="row"),
    "group": replace(BITNET, granularity="group", group_size=4),
    "group-16-bit-inputs": replace(BITNET, granularity="group", group_size=4, activations="none"),
    "twn": replace(BITNET, weights="twn"),
    "127.5": replace(BITNET, activations="int8-127.5"),
    "binary": replace(BITNET, levels="binary"),
    "dead-zone": replace(BITNET, dead_zone_bias=1e-3),
    "hadamard-all": replace(BITNET, hadamard="all", activations="int4"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_a_frozen_model_computes_the_same_bits(config, dtype):
    """Rows of 32, 16 and 54, which no 4 divides; biases on queries, keys and values."""
    width = 54 if config.granularity != "group" else 56
    model = build(replace(TINY, num_kv_heads=2, intermediate_size=width, qkv_bias=True)).to(dtype)
    if config.learned:
        for name in add_learned_scales_(model, config):
            model.get_parameter(name).data.uniform_(0.02, 0.05)
    quantize_(model, config)
    for num_tokens in (1, 5, 20):
        tokens_BT = random_tokens(2, num_tokens)
        with torch.no_grad():
            expected = model(tokens_BT).logits
            if num_tokens == 1:
                layers = {name: layer.weight_codes()[0] for name, layer in quantized_layers(model).items()}
                frozen = build_frozen(model)
            assert torch.equal(frozen(tokens_BT).logits, expected)
    assert not quantized_layers(frozen)
    for name, codes_OI in layers.items():
        layer = frozen.get_submodule(name)
        assert torch.equal(layer.codes(), codes_OI)
        assert layer.packed.numel() == -(-codes_OI.shape[0] // 4) * codes_OI.shape[1]


def build_frozen(model):
    frozen = deepcopy(model)
    assert freeze_(frozen) == list(quantized_layers(model))
    return frozen


def test_wide_layers_are_multiplied_in_blocks(monkeypatch):
    monkeypatch.setattr("quant.packed.BLOCK_BYTES", 100)
    layer = nn.Sequential(nn.Linear(33, 70))
    quantize_(layer, QuantConfig(include="0"))
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    freeze_(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[:1]), expected[:1])  # batches do not matter


@pytest.mark.parametrize("has_int8", [True, False])
@pytest.mark.parametrize("has_avx2", [False, torch.cpu._is_avx2_supported()])
@pytest.mark.parametrize("num_tokens", [1, 5, 6, 7])
def test_every_way_to_multiply_gives_the_same(num_tokens, has_avx2, has_int8, monkeypatch):
    """By bytes as they are read, by panels of codes, and by bits under a mask, in int8 and in fp32."""
    layer = nn.Sequential(nn.Linear(62, 18))
    quantize_(layer, QuantConfig(include="0"))
    x = torch.randn(num_tokens, 62, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    freeze_(layer)
    for module in ("integers", "packed"):
        monkeypatch.setattr(f"quant.{module}.CPU_HAS_INT8", has_int8)
    monkeypatch.setattr("quant.integers.CPU_HAS_PAIRS", has_avx2 and not has_int8)
    monkeypatch.setattr("quant.packed.CPU_HAS_AVX2", has_avx2)
    by_avx2 = Mock(wraps=avx2.product_in_bits)
    monkeypatch.setattr(avx2, "product_in_bits", by_avx2)
    assert torch.equal(layer(x), expected)
    assert by_avx2.called == (has_avx2 and (num_tokens <= 5 or not has_int8))


def test_what_several_layers_are_given_is_rounded_once(monkeypatch):
    """Once for queries, keys and values, and once for gate and up; but again after it has been written to."""
    model = build(TINY)
    quantize_(model, BITNET)
    freeze_(model)
    rounded = []
    monkeypatch.setattr("quant.packed.activation_codes", lambda x, how: rounded.append(x) or activation_codes(x, how))
    model(random_tokens(1, 5))
    assert len(rounded) == 4 * TINY.num_layers

    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected, _ = layer(-2 * x), layer(x)
    assert torch.equal(layer(x.mul_(-2)), expected)
    with torch.inference_mode():
        y = x.clone()
        layer(y)
        assert torch.equal(layer(y.mul_(-2)), layer(-2 * x))


def test_casting_leaves_the_scales_alone():
    model = build(TINY)
    quantize_(model, replace(BITNET, dead_zone_bias=1e-3))
    freeze_(model)
    layer = model.model.layers[0].mlp.up_proj
    level, dead_zone = layer.level.clone(), layer.dead_zone.clone()
    model.to(torch.bfloat16)
    assert model.head.dtype == torch.bfloat16
    assert layer.level.dtype == layer.dead_zone.dtype == torch.float32
    assert torch.equal(layer.level, level)
    assert torch.equal(layer.dead_zone, dead_zone)


def test_memory_is_two_bits_a_weight():
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False))
    quantize_(model, QuantConfig(include="."))
    assert memory_bytes(model) == 2 * 64 * 128 * 4
    freeze_(model)
    assert memory_bytes(model) == 2 * (64 * 128 // 4 + 4)
    assert isinstance(model[0], PackedLinear)


def test_latent_weights_are_let_go_without_the_collector(monkeypatch):
    import gc
    import weakref

    model = build(TINY)
    quantize_(model, PRESETS["nielsen-2025"])  # whose layers know each other
    weights = [weakref.ref(layer.weight) for layer in quantized_layers(model).values()]
    gc.collect()
    gc.disable()
    try:
        freeze_(model)
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("config", "strength", "message"),
    [
        (None, 1.0, "no quantized layer"),
        (
            BITNET,
            0.5,
            r"layers.0.self_attn.q_proj is at strengths 0.5 and 0.5 \(weights, activations\); both must be 1",
        ),
        (BITNET, 0.0, "both must be 1"),
        (replace(BITNET, levels="int2", weights="absmax"), 1.0, "int2 weights; only ternary and binary"),
    ],
)
def test_what_cannot_be_frozen(config, strength, message):
    model = build(TINY)
    if config:
        quantize_(model, config)
        set_strength_(model, strength)
    with pytest.raises(ValueError, match=message):
        freeze_(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 16, 17])
def test_few_rows_on_a_gpu(num_rows):
    generator = torch.Generator().manual_seed(0)
    codes_NI = torch.randint(-127, 128, (num_rows, 256), generator=generator, dtype=torch.int8)
    codes_OI = torch.randint(-1, 2, (64, 256), generator=generator, dtype=torch.int8)
    product = integer_product(codes_NI.cuda(), codes_OI.cuda())
    assert torch.equal(product.cpu(), (codes_NI.long() @ codes_OI.long().T).float())
