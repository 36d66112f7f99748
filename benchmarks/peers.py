"""One block's training step, ours with each ingredient in turn, and others' ternary training beside it.

Peers that are not installed are left out, and named: `pip install torchao bitlinear onebitllms`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.engine import compiling
from launcher.engine.compiling import compile_blocks_
from model.config import ModelConfig
from model.rotary import rotary_tables
from model.transformer import Block
from quant.config import PRESETS
from quant.keeper import CodeKeeper
from quant.linear import quantize_, set_strength_

BITNET = PRESETS["bitnet-b1.58"]


class NaiveBitLinear(nn.Linear):
    """Fake quantization as the BitNet authors' training notes write it: both operands rounded in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        rounded = (x * scale).round().clamp(-128, 127) / scale
        inverse = 1 / self.weight.abs().mean().clamp(min=1e-5)
        ternary = (self.weight * inverse).round().clamp(-1, 1) / inverse
        return F.linear(x + (rounded - x).detach(), self.weight + (ternary - self.weight).detach())


def naive(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if type(module) is nn.Linear:
            module.__class__ = NaiveBitLinear
    return block


def torchao_bitnet(block: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_ as change_

    change_(block, bitnet_training())
    return block


def torchao_int8(block: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_ as change_

    change_(block, int8_mixed_precision_training())
    return block


def bitlinear(block: nn.Module) -> nn.Module:
    from bitlinear import bitlinearize

    dtype = next(block.parameters()).dtype
    bitlinearize(block, replacements=[{"weight_measure": "AbsMean", "norm": None}])
    return block.to(dtype)


def onebitllms(block: nn.Module) -> nn.Module:
    from onebitllms import replace_linear_with_bitnet_linear

    return replace_linear_with_bitnet_linear(block)  # type: ignore[no-any-return]


def ours(backward: str = "exact", *, held: bool = True, strength: float = 1.0) -> Callable[[nn.Module], nn.Module]:
    def change(block: nn.Module) -> nn.Module:
        quantize_(block, replace(BITNET, include="_proj", backward=backward))
        set_strength_(block, strength)
        if held:
            block.keeper = CodeKeeper(block, whole=True, compiled=True)  # type: ignore[assignment]
        return block

    return change


VARIANTS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "16-bit, compiled": (lambda block: block, True),
    "16-bit, eager": (lambda block: block, False),
    "ramp": (ours(held=False, strength=0.5), True),
    "ternary, eager": (ours(), False),
    "ternary, codes made in each pass": (ours(held=False), True),
    "ternary": (ours(), True),
    "ternary, int8-input": (ours("int8-input"), True),
    "ternary, int8": (ours("int8"), True),
    "naive fake quantization": (naive, True),
    "torchao bitnet_training": (torchao_bitnet, True),
    "torchao int8 mixed precision (not ternary)": (torchao_int8, True),
    "bitlinear": (bitlinear, True),
    "onebitllms": (onebitllms, True),
}
"""By name, what a block is changed by, and whether it is compiled. The first is the baseline."""


@dataclass
class Step:
    """A training step of a block: forward, backward and optimizer."""

    run: Callable[[], None]
    saved_bytes: int
    """Kept for the backward pass, the parameters apart; codes that are held are counted."""
    graph_calls: int


def step_of(name: str, shape: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Step:
    """A step of a block of its own, which has run three times.

    Raises:
        ImportError: the peer is not installed.
    """
    change, compiled = VARIANTS[name]
    logging.getLogger("torchao").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with device:
        block = Block(shape)
    for parameter in block.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    block = change(block.to(dtype))
    keeper = getattr(block, "keeper", None)
    if compiled:
        compile_blocks_([block])
    x = torch.randn(num_tokens // shape.max_sequence_length, shape.max_sequence_length, shape.hidden_size)
    x = x.to(device, dtype)
    tables = rotary_tables(shape, shape.max_sequence_length, device)
    gradient = torch.randn_like(x) / num_tokens
    try:
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-5, fused=True)
    except RuntimeError:  # tensor subclasses
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-5)

    def forward() -> Tensor:
        if keeper is not None:
            keeper.fresh = False
            keeper.prepare()
        return block(x.clone().requires_grad_(), *tables)  # type: ignore[no-any-return]

    def run() -> None:
        forward().backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    run()
    run()
    before = compiling.num_calls
    run()
    graph_calls = compiling.num_calls - before
    return Step(run, saved_bytes(block, forward, x), graph_calls)


def saved_bytes(block: nn.Module, forward: Callable[[], Tensor], x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, without parameters and the input."""
    own = {plain(parameter).untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Any) -> Any:
        storage = plain(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = plain(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - x.untyped_storage().nbytes()


def plain(tensor: Any) -> Tensor:
    """What torchao's tensors hold."""
    return tensor._data if hasattr(tensor, "_data") else tensor
