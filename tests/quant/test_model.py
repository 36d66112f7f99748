"""Quantized layers in a whole model: which change, with which strengths, on which device, compiled or not."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from layers import EVERYTHING, assert_same_bits, build_input, build_linear, dequantized, every_dtype, forward_backward
from torch import nn
from torch._dynamo.testing import CompileCounter

from model.init import initialize_
from model.size import linear_shapes
from model.transformer import ModelConfig, Transformer
from quant.codes import pack_rows
from quant.config import QuantConfig
from quant.linear import (
    HeldCodes,
    QuantLinear,
    dequantize_,
    quantize_,
    quantized_layers,
    set_strength_,
    set_strengths_,
)

MODEL = ModelConfig(
    vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, sub_norm=True
)
PROJECTIONS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def build_transformer(**keys):
    config = MODEL if not keys else ModelConfig(**(vars(MODEL) | keys))
    model = Transformer(config)
    initialize_(model, seed=0)
    return model


def tokens(num_tokens=12):
    return torch.randint(0, 48, (2, num_tokens), generator=torch.Generator().manual_seed(2))


# A whole model


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_projections_of_the_blocks_change(tied):
    model = build_transformer(tie_embeddings=tied)
    before = {name: type(module) for name, module in model.named_modules()}
    assert quantize_(model, QuantConfig()) == PROJECTIONS
    assert list(quantized_layers(model)) == PROJECTIONS
    after = {name: type(module) for name, module in model.named_modules()}
    assert {name for name in after if after[name] is not before[name]} == set(PROJECTIONS)
    assert all(after[name] is QuantLinear for name in PROJECTIONS)
    assert ("lm_head" in after) is (not tied)


def test_parameters_are_the_same_objects_under_the_same_names():
    model = build_transformer()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    for change in (lambda: quantize_(model, QuantConfig()), lambda: dequantize_(model)):
        change()
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert list(model.state_dict()) == keys
        assert not dict(model.named_buffers())
    assert all(torch.equal(before[name], values[name]) for name in before)


@every_dtype
@pytest.mark.parametrize("tied", [True, False])
def test_strength_0_is_the_16_bit_model_bit_for_bit(dtype, tied):
    model, tokens_BT = build_transformer(tie_embeddings=tied).to(dtype), tokens()

    def loss_and_gradients():
        loss = model(tokens_BT, tokens_BT.roll(-1, 1)).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return {"loss": loss.detach()} | gradients

    plain = loss_and_gradients()
    quantize_(model, QuantConfig())
    ternary_loss = loss_and_gradients()["loss"]
    set_strength_(model, 0.0)
    assert_same_bits(loss_and_gradients(), plain)
    assert ternary_loss != plain["loss"]


def test_dequantize_undoes_quantize():
    model, tokens_BT = build_transformer(), tokens()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    logits = model(tokens_BT).logits
    quantize_(model, QuantConfig())
    assert not torch.equal(model(tokens_BT).logits, logits)
    dequantize_(model)
    assert torch.equal(model(tokens_BT).logits, logits)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert quantize_(model, QuantConfig(weights="absmedian")) == PROJECTIONS


def strengths_of(model):
    layers = quantized_layers(model).values()
    return {(layer.weight_strength.item(), layer.activation_strength.item()) for layer in layers}


def test_one_strength_for_all_layers():
    model = build_transformer()
    quantize_(model, QuantConfig())
    set_strength_(model, 0.375)
    assert strengths_of(model) == {(0.375, 0.375)}
    twin = copy.deepcopy(model)
    set_strength_(twin, 1.0)
    assert strengths_of(twin) == {(1.0, 1.0)}
    assert strengths_of(model) == {(0.375, 0.375)}


def test_blocks_have_strengths_of_their_own():
    """A block that is off computes as in 16 bits, one that is on as at strength 1."""
    model, x = build_transformer(), torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3))
    projections = [block.mlp.up_proj for block in model.model.layers]
    plain = [layer(x) for layer in projections]
    quantize_(model, QuantConfig())
    on = [layer(x) for layer in projections]
    set_strengths_(model, [0.0, 1.0], [0.0, 1.0])
    assert torch.equal(projections[0](x), plain[0])
    assert torch.equal(projections[1](x), on[1])
    set_strengths_(model, [0.5, 1.0], [0.0, 0.25])
    assert [layer.mode for layer in projections] == ["ramp", "ramp"]
    weight, rounded = dequantized(projections[1], x, QuantConfig())
    expected = F.linear(torch.lerp(x, rounded, 0.25), weight)
    assert torch.equal(projections[1](x), expected)


def test_a_model_starts_at_full_strength():
    model = build_transformer()
    quantize_(model, QuantConfig())
    at_start = model(tokens()).logits
    set_strength_(model, 1.0)
    assert torch.equal(model(tokens()).logits, at_start)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm-nonparametric"])
def test_no_token_sees_a_later_one(strength, norm):
    model = build_transformer(norm=norm)
    quantize_(model, QuantConfig())
    set_strength_(model, strength)
    tokens_BT = tokens()
    with torch.no_grad():
        logits = model(tokens_BT).logits
        for t in range(tokens_BT.shape[1] - 1):
            changed = tokens_BT.clone()
            changed[:, t + 1] = (changed[:, t + 1] + 1) % 48
            changed_logits = model(changed).logits
            assert torch.equal(changed_logits[:, : t + 1], logits[:, : t + 1])
            assert not torch.equal(changed_logits[:, t + 1], logits[:, t + 1])


def test_sequences_of_a_batch_are_independent():
    model = build_transformer()
    quantize_(model, QuantConfig())
    tokens_BT = tokens()
    changed = tokens_BT.clone()
    changed[1] = (changed[1] + 1) % 48
    assert torch.equal(model(changed).logits[0], model(tokens_BT).logits[0])


def test_the_pattern_chooses():
    model = build_transformer(tie_embeddings=False)
    assert quantize_(model, QuantConfig(include=r"mlp\.down_proj$|lm_head")) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_the_head_stays_plain():
    model, tokens_BT = build_transformer(tie_embeddings=False), tokens()
    assert quantize_(model, QuantConfig(include=".")) == PROJECTIONS
    with torch.no_grad():
        assert torch.equal(model(tokens_BT).logits, model.lm_head(model.model(tokens_BT)))
    assert set(linear_shapes(model.config, ".")) == {f"{name}.weight" for name in PROJECTIONS}


def test_only_plain_linears_change():
    class Projection(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Projection(2, 2))
    assert quantize_(model, EVERYTHING) == ["0"]
    assert type(model[1]) is Projection


# Errors


def test_a_pattern_that_matches_nothing_is_an_error():
    model = build_transformer()
    with pytest.raises(
        ValueError, match=r"include='attn\.proj' matches no linear layer; there are, for example, \['model"
    ):
        quantize_(model, QuantConfig(include=r"attn.proj"))
    assert not quantized_layers(model)
    with pytest.raises(ValueError, match="matches no linear layer"):
        quantize_(nn.Embedding(2, 2), EVERYTHING)


def test_twice_is_an_error():
    model = build_transformer()
    quantize_(model, QuantConfig())
    with pytest.raises(ValueError, match="the model is already quantized"):
        quantize_(model, QuantConfig())


def test_a_model_without_quantized_layers_is_an_error():
    for change in (dequantize_, lambda model: set_strength_(model, 0.5)):
        with pytest.raises(ValueError, match="no quantized layer; call quantize_ first"):
            change(build_transformer())


@pytest.mark.parametrize("strength", [-0.001, 1.001, float("nan"), float("inf")])
def test_strength_outside_of_0_to_1_is_an_error(strength):
    model = build_transformer()
    quantize_(model, QuantConfig())
    set_strength_(model, 0.5)
    with pytest.raises(ValueError, match=re.escape(f"strength is {strength}; must be between 0 and 1")):
        set_strength_(model, strength)
    assert strengths_of(model) == {(0.5, 0.5)}


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match="is not a regular expression") as caught:
        QuantConfig(include="((")
    assert set(caught.value.args[0]) == {"include"}


# Meta device and compilation


def test_on_the_meta_device_the_strength_is_where_the_model_will_compute():
    with torch.device("meta"):
        model = Transformer(MODEL)
    with pytest.raises(ValueError, match="meta device; pass the device"):
        quantize_(model, QuantConfig())
    assert not quantized_layers(model)
    quantize_(model, QuantConfig(), torch.device("cpu"))
    assert {layer.weight_strength.device.type for layer in quantized_layers(model).values()} == {"cpu"}
    model.to_empty(device="cpu")
    initialize_(model, seed=0)
    expected = build_transformer()
    quantize_(expected, QuantConfig())
    for strength in (1.0, 0.5):
        set_strength_(model, strength)
        set_strength_(expected, strength)
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_graph_for_each_mode(training):
    """Plain, ramp and codes; all strengths of a ramp share theirs."""
    model, tokens_BT = build_transformer(num_layers=1), tokens()
    quantize_(model, QuantConfig())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(training):
        for strength in (0.0, 0.1, 0.5, 0.999, 1.0, 0.25, 0.0):
            set_strength_(model, strength)
            torch.testing.assert_close(compiled(tokens_BT).logits, model(tokens_BT).logits)
    assert counter.frame_count == 3


def test_gathered_codes_take_no_second_graph():
    layer, x = build_linear(), build_input()
    quantize_(layer, QuantConfig(include=""))
    expected = forward_backward(layer, x)
    layer.held = HeldCodes(layer.rounding_scale(layer.weight), pack_rows(layer.weight_codes()[0]))
    layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape))  # there is nothing to read from
    found = forward_backward(layer, x)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x), expected["y"])
    assert counter.frame_count == 1


def test_compiled_gradients_are_those_of_eager():
    layer, x = build_linear(), build_input()
    quantize_(layer, EVERYTHING)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for strength in (0.0, 0.5, 1.0):
        set_strength_(layer, strength)
        eager = forward_backward(layer, x)
        x_leaf = x.clone().requires_grad_()
        y = compiled(x_leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        torch.testing.assert_close(y, eager["y"])
        torch.testing.assert_close(x_leaf.grad, eager["x"])
        torch.testing.assert_close(layer.weight.grad, eager["weight"])
        layer.zero_grad()
