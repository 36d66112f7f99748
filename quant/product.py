"""The product of a quantized layer: integer codes are multiplied exactly; scales are applied afterwards.

Sums of int8 codes are exact, in int32 as in fp32 as long as they stay below 2**24, so that every engine, device, kernel
and export has the same integers, bit for bit. The scales are applied once, in fp32. The latent weights and the inputs
get straight-through gradients by the dequantized operands.

Dimensions: N rows (tokens), O output features, I input features, G groups of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.codes import unpack_rows
from quant.config import QuantConfig
from quant.rounding import Scale, dequantize, quantize_activation, weight_codes, weight_gradients

_CPU_HAS_INT8 = torch.cpu._is_vnni_supported()


def integer_product(codes_NI: Tensor, codes_OI: Tensor) -> Tensor:
    """Sums of products of int8 codes, ``codes_NI @ codes_OI.T``, as fp32 [N, O].

    Exact while sums stay below 2**24: with 8-bit activations and ternary weights, up to 132,104 input features.
    """
    N, (O, I) = len(codes_NI), codes_OI.shape  # noqa: E741
    on_cpu = codes_NI.device.type == "cpu"
    if not (_CPU_HAS_INT8 if on_cpu else O % 8 == 0 and I % 8 == 0):
        return F.linear(codes_NI.float(), codes_OI.float())
    if not on_cpu and N <= 16:  # cuBLAS takes more rows
        return torch._int_mm(F.pad(codes_NI, (0, 0, 0, 17 - N)), codes_OI.T)[:N].float()
    return torch._int_mm(codes_NI, codes_OI.T).float()


def unrounded_product(x: Tensor, codes_OI: Tensor, level: Tensor) -> Tensor:
    """``x @ (codes * level).T`` of inputs that are not rounded, in the dtype of ``x``."""
    if level.shape[1] > 1:
        return F.linear(x, dequantize(codes_OI, level).to(x.dtype))
    return (F.linear(x, codes_OI.to(x.dtype)) * level[:, 0]).to(x.dtype)


def grouped_product(codes_NI: Tensor, codes_OI: Tensor, level_OG: Tensor) -> Tensor:
    """Integer products, each group's times its level, added up in fp32 in the order of the groups; [N, O]."""
    size = codes_OI.shape[1] // level_OG.shape[1]
    parts = zip(codes_NI.split(size, 1), codes_OI.split(size, 1), level_OG.unbind(1), strict=True)
    total = torch.zeros(len(codes_NI), len(codes_OI), device=codes_NI.device)
    for codes_NK, codes_OK, level_O in parts:
        total += integer_product(codes_NK.contiguous(), codes_OK.contiguous()) * level_O
    return total


class CodeProduct(torch.autograd.Function):
    """``x @ weight.T`` of a quantized layer at full strength, [..., O] in the dtype of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        level: Tensor,
        threshold: Tensor | None,
        config: QuantConfig,
        packed_OJ: Tensor | None = None,
    ) -> Tensor:
        """Multiply; keeps 8-bit codes of the input and the latent weight, whose codes are computed again.

        Args:
            ctx: of the function.
            x: [..., I].
            weight_OI: latent.
            level: [1, 1], [O, 1] or [O, G], fp32.
            threshold: of the same shape, see `Scale`.
            config: how both are rounded.
            packed_OJ: the weight's codes, `pack_rows` of them; only its shape and dtype are then looked at.
        """
        ctx.config, ctx.width = config, None if packed_OJ is None else weight_OI.shape[1]
        source = weight_OI if packed_OJ is None else packed_OJ
        codes_OI = _codes(source, level, threshold, ctx)
        if config.activations == "none":
            ctx.save_for_backward(x, None, source, level, threshold)
            # A view, as below: compiled by torch 2.11, a cast without effect at the end got zeros as its gradient.
            return unrounded_product(x, codes_OI, level).view(*x.shape[:-1], len(weight_OI))
        codes, scale = quantize_activation(x, config.activations)
        codes = codes.to(torch.int8)
        ctx.save_for_backward(codes, scale, source, level, threshold)
        codes_NI, scale_N1, codes_OI = codes.flatten(0, -2), scale.flatten(0, -2), codes_OI.to(torch.int8)
        if level.shape[1] > 1:
            product = grouped_product(codes_NI, codes_OI, level) * scale_N1
        else:
            product = integer_product(codes_NI, codes_OI) * (scale_N1 * level[:, 0])
        return product.to(x.dtype).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Gradients by x, the latent weight and, where it is learned, the level."""
        codes, scale, source, level, threshold = ctx.saved_tensors
        codes_OI = _codes(source, level, threshold, ctx)
        grad_x = grad_weight = grad_level = None
        if ctx.needs_input_grad[0]:
            if level.shape[1] > 1:
                grad_x = grad @ dequantize(codes_OI, level).to(grad.dtype)
            else:
                grad_x = (grad * level[:, 0]).to(grad.dtype) @ codes_OI.to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = codes if scale is None else (codes * scale).to(grad.dtype)
            grad_OI = grad.flatten(0, -2).T @ x.flatten(0, -2)
            grad_weight, grad_level = weight_gradients(grad_OI, source, codes_OI, level, ctx.config)
        return grad_x, grad_weight, grad_level, None, None, None


def _codes(source: Tensor, level: Tensor, threshold: Tensor | None, ctx: Any) -> Tensor:
    """Codes of the latent weight, fp32, or of packed codes, int8."""
    if ctx.width is None:
        return weight_codes(source, Scale(level, threshold), ctx.config)
    return unpack_rows(source, ctx.width)


class RoundedWeight(torch.autograd.Function):
    """``codes * level`` in the dtype of the weight, to be blended with it; gradients as in `CodeProduct`."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, level: Tensor, threshold: Tensor | None, config: QuantConfig) -> Tensor:
        """The arguments are those of `CodeProduct`."""
        ctx.config = config
        ctx.save_for_backward(weight_OI, level, threshold)
        codes_OI = weight_codes(weight_OI, Scale(level, threshold), config)
        return dequantize(codes_OI, level).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Gradients by the latent weight and the level."""
        weight_OI, level, threshold = ctx.saved_tensors
        codes_OI = weight_codes(weight_OI, Scale(level, threshold), ctx.config)
        grad_weight, grad_level = weight_gradients(grad, weight_OI, codes_OI, level, ctx.config)
        return grad_weight, grad_level, None, None


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
