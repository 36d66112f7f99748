"""Quantization-aware linear layers that attach to a finished 16-bit model from outside.

`quantize_` changes the class of matching ``nn.Linear`` modules to `QuantLinear`. Parameters stay the very same
objects under the same names, so optimizers, sharding and checkpoints do not notice, and a strength of 0 computes bit
for bit what the 16-bit model computes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.rounding import WeightQuantizer, int8_per_token, ternary


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What is quantized in a ternary phase, and how."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
    }

    weights: WeightQuantizer = "absmean"
    """Statistic of the whole matrix that is its scale: `absmean` (BitNet b1.58) or `absmedian` (b1.58 Reloaded)."""
    activations: Literal["int8", "none"] = "int8"
    """Inputs of the quantized layers: `int8` (absmax per token) or `none` (left in 16 bits)."""
    include: str = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
    """Regular expression searched in the dotted names of the linear layers; those that match are quantized."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.include)
        except re.error as error:
            raise ValueError({"include": f"{self.include!r} is not a regular expression: {error}"}) from error


class StraightThrough(torch.autograd.Function):
    """``x + strength * (rounded - x)``, with the gradient of ``x`` alone (arXiv 1308.3432).

    `torch.lerp` is exact at both ends: strength 0 returns ``x`` and strength 1 returns ``rounded``, bit for bit, which
    the written-out sum does not.
    """

    @staticmethod
    def forward(x: Tensor, rounded: Tensor, strength: Tensor) -> Tensor:
        """Blend two tensors of one shape and dtype; ``strength`` is a 0-dim tensor in [0, 1]."""
        return torch.lerp(x, rounded, strength.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept for the backward pass."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient straight through to ``x``."""
        return gradients[0], None, None


class QuantLinear(nn.Linear):
    """An ``nn.Linear`` whose forward sees ternary weights and 8-bit activations, by the model's current strength."""

    quant_config: QuantConfig
    strength: Tensor
    probe: Callable[["QuantLinear", Tensor], None] | None = None

    def weight_codes(self) -> tuple[Tensor, Tensor]:
        return ternary(self.weight.detach(), self.quant_config.weights)

    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return int8_per_token(x.detach()) if self.quant_config.activations == "int8" else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is [..., I], the result [..., O]; both in the dtype of the weight."""
        if self.probe is not None:
            self.probe(self, x)
        codes_OI, scale = ternary(self.weight.detach(), self.quant_config.weights)
        weight_OI = StraightThrough.apply(self.weight, (codes_OI * scale).to(self.weight.dtype), self.strength)
        if self.quant_config.activations == "int8":
            codes, scale = int8_per_token(x.detach())
            x = StraightThrough.apply(x, (codes * scale).to(x.dtype), self.strength)
        return F.linear(x, weight_OI, self.bias)


def quantize_(model: nn.Module, config: QuantConfig, device: torch.device | None = None) -> list[str]:
    """Turn every matching ``nn.Linear`` of ``model`` into a `QuantLinear` in place, at strength 1.

    All layers share one 0-dim strength tensor (see `set_strength_`), so that neither a ramp nor a compiled graph needs
    to know how many there are.

    Args:
        model: what is changed; its parameters stay the same objects.
        config: which layers, and how.
        device: where the strength lives; by default where the parameters do, which must be given on the meta device.

    Returns:
        The dotted names of the layers that were changed.

    Raises:
        ValueError: the pattern matches no linear layer, the model is quantized already, or it is on the meta device
            and ``device`` is not given.
    """
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already")
    matches = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and re.search(config.include, name)
    }
    if not matches:
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        raise ValueError(f"include={config.include!r} matches none of the linear layers, such as {linears[:3]}")
    device = device or next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("the model is on the meta device: give the device on which it will compute")
    strength = torch.ones((), device=device)
    for module in matches.values():
        module.__class__ = QuantLinear
    for layer in quantized_layers(model).values():
        layer.quant_config, layer.strength = config, strength
    return list(matches)


def dequantize_(model: nn.Module) -> None:
    """Undo `quantize_`: the layers compute with their latent weights again, as plain ``nn.Linear``.

    Raises:
        ValueError: no layer is quantized.
    """
    for module in _expect_quantized(model).values():
        module.__class__ = nn.Linear  # type: ignore[assignment]
        del module.quant_config, module.strength


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of ``model`` by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def set_strength_(model: nn.Module, strength: float) -> None:
    """Set how much of the quantization is on, from 0 (none: the 16-bit model) to 1 (all of it).

    Raises:
        ValueError: the strength is outside of 0 to 1, or no layer is quantized.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is outside of 0 to 1")
    next(iter(_expect_quantized(model).values())).strength.fill_(strength)


def _expect_quantized(model: nn.Module) -> dict[str, QuantLinear]:
    if layers := quantized_layers(model):
        return layers
    raise ValueError("the model has no quantized layer: call quantize_ first")
