"""What a block keeps between its passes: nothing as large as a weight, compiled or not; and inputs are rounded once."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quant.integers
import quant.linear
import quant.rounding
from model.config import ModelConfig
from model.rotary import rotary_tables
from model.transformer import Block
from quant.config import QuantConfig
from quant.keeper import CodeKeeper
from quant.linear import quantize_, quantized_layers, set_strength_

T = 20
CONFIG = ModelConfig(
    vocab_size=8, hidden_size=48, num_layers=1, num_heads=2, intermediate_size=112, max_sequence_length=T
)
WEIGHTS = {48 * 48, 48 * 112}
"""Elements of the weights, which no activation has."""


def build(
    config: QuantConfig, strength: float = 1.0, model: ModelConfig = CONFIG
) -> tuple[Block, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    block = Block(model)
    quantize_(block, config)
    set_strength_(block, strength)
    return block, torch.randn(2, T, 48), rotary_tables(CONFIG, T, torch.device("cpu"))


def kept_weights(block: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor]) -> list[str]:
    """What is kept of the size of a weight, the weights themselves aside, and whatever is held for them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    own |= {layer.held.codes.untyped_storage().data_ptr() for layer in quantized_layers(block).values() if layer.held}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x.clone().requires_grad_(), *tables).sum().backward()
    return [
        f"{t.dtype} {t.numel()}" for t in kept if t.numel() in WEIGHTS and t.untyped_storage().data_ptr() not in own
    ]


CASES = {
    "made in each pass": (QuantConfig(include="_proj"), 1.0, False),
    "held in 2 bits": (QuantConfig(include="_proj"), 1.0, True),
    "held as int8": (QuantConfig(include="_proj", levels="int2"), 1.0, True),
    "8-bit backward": (QuantConfig(include="_proj", backward="int8"), 1.0, True),
    "ramp": (QuantConfig(include="_proj"), 0.5, False),
    "ramp, clipped": (QuantConfig(include="_proj", gradient="clipped"), 0.5, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_as_large_as_a_weight_is_kept(case: str, compiled: bool) -> None:
    config, strength, held = CASES[case]
    block, x, tables = build(config, strength)
    if held:
        CodeKeeper(block, whole=True, compiled=False).prepare()
        assert all(layer.held is not None for layer in quantized_layers(block).values())
    expected = kept_gradients(block, x, tables)
    if compiled:
        torch._dynamo.reset()
        block.compile(dynamic=False)
    assert kept_weights(block, x, tables) == []
    for name, gradient in kept_gradients(block, x, tables).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0.05, atol=2e-3)


def kept_gradients(block: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    block.zero_grad()
    block(x.clone().requires_grad_(), *tables).square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
    block.zero_grad()
    return gradients


def kept_bytes(block: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor]) -> int:
    """Bytes between the passes, codes that are held among them, without the parameters and the input."""
    x = x.clone().requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, *tables).sum().backward()
    return sum(kept.values())


@pytest.mark.slow
def test_a_compiled_block_keeps_three_fourths_of_the_16_bit_one() -> None:
    """In fp32, of as many tokens as the block is wide."""
    width, T = 256, 128
    config = replace(CONFIG, hidden_size=width, intermediate_size=width * 11 // 4, max_sequence_length=T)
    x, tables = torch.randn(2, T, width), rotary_tables(config, T, torch.device("cpu"))
    sizes = []
    for ternary in (False, True):
        block = Block(config)
        if ternary:
            quantize_(block, QuantConfig(include="_proj"))
            CodeKeeper(block, whole=True, compiled=False).prepare()
        torch._dynamo.reset()
        block.compile(dynamic=False)
        sizes.append(kept_bytes(block, x, tables))
    assert sizes[1] <= 0.75 * sizes[0]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("recording", [True, False])
def test_an_input_is_rounded_once_for_all_that_are_given_it(
    strength: float, recording: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[tuple[int, ...]] = []
    theirs = quant.rounding.quantize_activation
    for module in (quant.linear, quant.integers):
        monkeypatch.setattr(
            module, "quantize_activation", lambda x, activations: rounded.append(x.shape) or theirs(x, activations)
        )
    block, x, tables = build(QuantConfig(include="_proj"), strength)
    with torch.set_grad_enabled(recording):
        block(x, *tables)
    assert rounded == [(2, T, 48), (2, T, 48), (2, T, 48), (2, T, 112)]


@pytest.mark.parametrize("config", [QuantConfig(include="_proj"), QuantConfig(include="_proj", layer_norm=True)])
def test_nothing_is_remembered_of_an_input_that_is_gone(config: QuantConfig) -> None:
    block, x, tables = build(config)
    block(x, *tables).sum().backward()
    layer = block.self_attn.q_proj
    given = torch.randn(2, T, 48, requires_grad=True) * 1
    y = layer(given)
    made = weakref.ref(layer.shared_input)
    assert made() is block.self_attn.k_proj.shared_input is not block.mlp.up_proj.shared_input
    assert layer.shared_input._made is not None
    y.sum().backward()
    del y, given
    gc.collect()
    assert layer.shared_input._made is None


RECORDED = {
    "normalized": QuantConfig(include="_proj", layer_norm=True),
    "rotated": QuantConfig(include="_proj", hadamard="all"),
}
"""Recipes that make something of an input which gradients go through."""


@pytest.mark.parametrize("recipe", RECORDED)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_block_that_reads_its_input_directly_can_be_computed_again(recipe: str, strength: float) -> None:
    """The backward pass of activation checkpointing gives layers the tensor that the forward pass gave them."""
    block, x, tables = build(RECORDED[recipe], strength, replace(CONFIG, norm_position="post"))
    gradients = []
    for checkpointing in (False, True):
        block.zero_grad()
        given = x.clone().requires_grad_()
        y = checkpoint(block, given, *tables, use_reentrant=False) if checkpointing else block(given, *tables)
        assert all(layer.shared_input._made is None for layer in quantized_layers(block).values())
        y.square().sum().backward()
        gradients.append([given.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(map(torch.equal, *gradients))


def test_a_layer_that_is_called_twice_can_be_computed_again() -> None:
    block, x, _ = build(RECORDED["normalized"])
    layer = block.self_attn.q_proj

    def forward(x: Tensor) -> Tensor:
        return layer(x) + layer(x)

    plain, again = (x.clone().requires_grad_() for _ in range(2))
    forward(plain).square().sum().backward()
    checkpoint(forward, again, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.grad, again.grad)


def test_what_was_made_without_gradients_is_not_taken_with_them() -> None:
    block, _, _ = build(QuantConfig(include="_proj", layer_norm=True))
    x = torch.randn(2, T, 48, requires_grad=True)
    with torch.no_grad():
        block.self_attn.q_proj(x)
    block.self_attn.k_proj(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
