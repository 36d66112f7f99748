from dataclasses import replace
from functools import partial

import pytest
import torch
from models import VARIANTS, build, every_variant, random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model.size import activation_bytes, flops_per_token, num_linear_parameters, num_parameters, parameter_shapes
from model.transformer import ModelConfig, Transformer
from quant.config import QuantConfig
from quant.linear import quantize_, set_strength_

BITNET_2B4T = ModelConfig(
    vocab_size=128_256,
    hidden_size=2560,
    num_layers=30,
    num_heads=20,
    num_kv_heads=5,
    intermediate_size=6912,
    activation="relu2",
    sub_norm=True,
    rope_theta=500_000.0,
)


@every_variant
def test_shapes_are_those_of_the_module(config):
    with torch.device("meta"):
        model = Transformer(config)
    in_order = [(name, tuple(value.shape)) for name, value in model.named_parameters()]
    assert list(parameter_shapes(config).items()) == in_order
    assert set(parameter_shapes(config)) == set(model.state_dict())
    assert num_parameters(config) == sum(value.numel() for value in model.parameters())
    in_blocks = [module for name, module in model.named_modules() if "layers" in name]
    linear = [module.weight.numel() for module in in_blocks if isinstance(module, torch.nn.Linear)]
    assert num_linear_parameters(config) == sum(linear)


def test_a_published_model_has_its_published_size():
    assert num_parameters(BITNET_2B4T) == 2_412_820_480
    assert num_linear_parameters(BITNET_2B4T) == 30 * (2 * 2560 * 2560 + 2 * 2560 * 640 + 3 * 2560 * 6912)


@every_variant
def test_flops_are_those_that_run(config):
    """Torch's counter runs the products that our formula counts; its attention is full, ours causal."""
    model, tokens_BT = build(config), random_tokens(3, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens_BT, tokens_BT).loss.backward()
    full_attention = 12 * config.num_layers * config.num_heads * config.head_width * 16
    causal_attention = full_attention * 17 // 32
    assert flops_per_token(config, 16) == counter.get_total_flops() / 48 - full_attention + causal_attention


def held_bytes(model: Transformer, tokens_BT: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens_BT, tokens_BT)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", ["no", "ramp", "codes"])
def test_activation_estimate_is_what_autograd_holds(config, dtype, quantized):
    # Heads of a usual width: the estimate leaves out the one or two statistics of each normalized row.
    wide = {"hidden_size": 128, "intermediate_size": 224, "head_dim": 40 if config.head_dim else None}
    config = replace(config, max_sequence_length=128, **wide)
    model, tokens_BT = build(config).to(dtype), random_tokens(4, 128)
    if quantized != "no":
        quantize_(model, QuantConfig())
        set_strength_(model, 0.5 if quantized == "ramp" else 1.0)
    estimate = activation_bytes(config, 4, 128, dtype.itemsize, checkpointing=False, quantized=quantized)
    assert estimate == pytest.approx(held_bytes(model, tokens_BT), rel=0.05)


@pytest.mark.parametrize("name", ["llama", "olmo2", "bitnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_holds_inputs_and_one_block(name, dtype):
    config = replace(VARIANTS[name], max_sequence_length=128, num_layers=4)
    model, tokens_BT = build(config).to(dtype), random_tokens(4, 128)
    without = held_bytes(model, tokens_BT)
    for block in model.model.layers[1:]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    one_block_whole = held_bytes(model, tokens_BT)
    assert one_block_whole < without
    estimate = activation_bytes(config, 4, 128, dtype.itemsize, checkpointing=True, quantized="no")
    assert estimate == pytest.approx(one_block_whole, rel=0.1)
