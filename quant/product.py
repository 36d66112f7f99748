"""The products of a quantized layer: integer codes are multiplied exactly; scales are applied afterwards.

The latent weights and the inputs get straight-through gradients by the dequantized operands.

Dimensions: N rows (tokens), O output features, I input features, G groups of a row, J bytes of a row.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.codes import from_held
from quant.config import QuantConfig
from quant.hadamard import rotate, rotate_weight
from quant.integers import integer_product, rounded_product, scaled_product, summed_product
from quant.ramp import Rounding
from quant.rounding import Scale, dequantize, over_blocks, weight_codes, weight_gradients, weight_in_codes
from quant.soft import soft_codes, soft_share, temperature


def unrounded_product(x: Tensor, codes_OI: Tensor, level: Tensor) -> Tensor:
    """``x @ (codes * level).T`` of inputs that are not rounded, in the dtype of ``x``."""
    if level.shape[1] > 1:
        return F.linear(x, dequantize(codes_OI, level).to(x.dtype))
    return (F.linear(x, codes_OI.to(x.dtype)) * level[:, 0]).to(x.dtype)


def grouped_product(codes_NI: Tensor, codes_OI: Tensor, level_OG: Tensor) -> Tensor:
    """Integer products, each group's times its level, added up in fp32 in the order of the groups; [N, O]."""
    size = codes_OI.shape[1] // level_OG.shape[1]
    parts = zip(codes_NI.split(size, 1), codes_OI.split(size, 1), level_OG.unbind(1), strict=True)
    total = torch.zeros(len(codes_NI), len(codes_OI), dtype=torch.float32, device=codes_NI.device)
    for codes_NK, codes_OK, level_O in parts:
        total += integer_product(codes_NK.contiguous(), codes_OK.contiguous()) * level_O
    return total


def _rows(x: Tensor) -> Tensor:
    """A matrix of all last dimensions, of which a vector has one."""
    return x.reshape(-1, x.shape[-1])


_OPERATORS = torch.library.Library("tritrain", "FRAGMENT")
_OPERATORS.define("late_zero(Tensor grad) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_OPERATORS, "late_zero", "CompositeExplicitAutograd")
@torch.library.register_fake("tritrain::late_zero", lib=_OPERATORS)
def _late_zero(grad: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.uint8, device=grad.device)


def made_again(x: Tensor, grad: Tensor) -> Tensor:
    """``x``, so that what the backward pass makes of it is made there.

    A compiler finds that the forward pass has made the same, and keeps that instead: whole matrices of every layer. It
    cannot know that 0 is added, which ``grad`` has to be there for.
    """
    return x + torch.ops.tritrain.late_zero(grad).to(x.dtype) if torch.compiler.is_compiling() else x


class CodeProduct(torch.autograd.Function):
    """``x @ weight.T`` of a quantized layer at full strength, [..., O] in the dtype of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor | None,
        scale: Tensor | None,
        weight_OI: Tensor,
        level: Tensor,
        threshold: Tensor | None,
        held: Tensor | None,
        config: QuantConfig,
    ) -> Tensor:
        """Multiply; keeps 8-bit codes of the input, and the held codes of the weight or what they are made from.

        Args:
            ctx: of the function.
            x: [..., I].
            codes: of the input, int8, of its shape; None to leave it in 16 bits.
            scale: of each token, fp32, [..., 1].
            weight_OI: latent. Where codes are held and the gradient is passed on as it is, its values are not read.
            level: [1, 1], [O, 1] or [O, G], fp32.
            threshold: of the same shape, see `Scale`.
            held: the weight's codes, int8 [O, I] or `pack_rows` of them, uint8 [O, J]; None to make them here.
            config: how both are rounded.
        """
        ctx.config, ctx.width = config, weight_OI.shape[1]
        needs_weight = held is None or config.learned or config.gradient != "identity"
        codes_OI = _codes(weight_OI, level, threshold, held, ctx)
        codes = x if codes is None else codes
        ctx.save_for_backward(codes, scale, weight_OI if needs_weight else None, level, threshold, held)
        if scale is None:
            # A view, as below: compiled by torch 2.11, a cast without effect at the end got zeros as its gradient.
            return unrounded_product(x, codes_OI, level).view(*x.shape[:-1], len(codes_OI))
        codes_NI, scale_N1 = _rows(codes), _rows(scale)
        if level.shape[1] > 1:
            product = grouped_product(codes_NI, codes_OI, level) * scale_N1
        else:
            product = scaled_product(codes_NI, codes_OI, scale_N1, level, x.dtype)
        return product.to(x.dtype).view(*x.shape[:-1], len(codes_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, the latent weight and, where it is learned, the level."""
        codes, scale, weight_OI, level, threshold, held = ctx.saved_tensors
        config, grad_x, grad_weight, grad_level = ctx.config, None, None, None
        grad_NO = _rows(grad)
        again = made_again(level, grad) if held is None else level
        codes_OI = _codes(weight_OI, again, threshold, None if held is None else made_again(held, grad), ctx)
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad_NO, codes_OI, level, config).view(codes.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            grad_OI = _weight_gradient(grad_NO, _rows(codes), scale, config)
            grad_weight, grad_level = weight_gradients(grad_OI, weight_OI, codes_OI, level, config)
        return grad_x, None, None, grad_weight, grad_level, None, None, None


def _codes(weight_OI: Tensor, level: Tensor, threshold: Tensor | None, held: Tensor | None, ctx: Any) -> Tensor:
    """Codes of a weight, int8 [O, I]."""
    if held is None:
        return weight_codes(weight_OI, Scale(level, threshold), ctx.config).to(torch.int8)
    return from_held(held, ctx.width)


def _input_gradient(grad_NO: Tensor, codes_OI: Tensor, level: Tensor, config: QuantConfig) -> Tensor:
    """``grad @ (codes * level)`` in the dtype of the gradient."""
    if level.shape[1] > 1:
        return grad_NO @ dequantize(codes_OI, level).to(grad_NO.dtype)
    scaled_NO = grad_NO * level[:, 0]
    if config.backward == "exact":
        return scaled_NO.to(grad_NO.dtype) @ codes_OI.to(grad_NO.dtype)
    return rounded_product(scaled_NO, codes_OI, grad_NO.dtype)


def _weight_gradient(grad_NO: Tensor, codes_NI: Tensor, scale: Tensor | None, config: QuantConfig) -> Tensor:
    """``grad.T @ (codes * scale)`` in the dtype of the gradient."""
    if scale is None:
        return grad_NO.T @ codes_NI
    scale_N1 = _rows(scale)
    if config.backward != "int8":
        return grad_NO.T @ (codes_NI * scale_N1).to(grad_NO.dtype)
    return summed_product(grad_NO, codes_NI, scale_N1)


class BlendedProduct(torch.autograd.Function):
    """``x @ (weight + share * (rounded weight - weight)).T`` of a layer on a ramp, in the dtype of ``x``.

    The share is the strength, or what `quant.soft` makes of it with ``rounding`` softmax. The blended weight, as large
    as the weight itself and never sharded, is not kept for the backward pass but made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        level: Tensor,
        threshold: Tensor | None,
        strength: Tensor,
        bias: Tensor | None,
        config: QuantConfig,
        rotated: bool,
        rounding: Rounding,
    ) -> Tensor:
        """Multiply.

        Args:
            ctx: of the function.
            x: [..., I], blended.
            weight_OI: latent, not rotated; multiplied in the dtype of ``x``.
            level: as in `CodeProduct`.
            threshold: of the same shape.
            strength: 0-dim.
            bias: [O].
            config: how the weight is rounded.
            rotated: whether it is rotated before.
            rounding: between strengths 0 and 1.
        """
        ctx.config, ctx.rotated, ctx.rounding = config, rotated, rounding
        ctx.save_for_backward(x, weight_OI, level, threshold, strength)
        weight = _blend(weight_OI, level, threshold, strength, ctx).weight.to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, the latent weight, the bias and, where it is learned, the level."""
        x, weight_OI, level, threshold, strength = ctx.saved_tensors
        blend = _blend(weight_OI, made_again(level, grad), threshold, strength, ctx)
        grad_NO = _rows(grad)
        grad_x = grad @ blend.weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_level = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_OI = grad_NO.T @ _rows(x)
            if blend.slope is None and ctx.config.gradient == "identity" and not ctx.config.learned:
                grad_weight = grad_OI
            else:
                share = blend.share.to(grad.dtype)
                of_rounded = grad_OI * share
                of_rounded = rotate(of_rounded) if ctx.rotated else of_rounded
                of_rounded, grad_level = weight_gradients(of_rounded, blend.rotated, blend.codes, level, ctx.config)
                of_rounded = of_rounded if blend.slope is None else of_rounded * blend.slope.to(grad.dtype)
                of_rounded = rotate(of_rounded) if ctx.rotated else of_rounded
                grad_weight = grad_OI * (1 - share) + of_rounded
        grad_bias = grad_NO.sum(0) if ctx.needs_input_grad[5] else None
        return grad_x, grad_weight, grad_level, None, None, grad_bias, None, None, None


class _Blend(NamedTuple):
    """A weight that is rounded in part; but for the share, all are [O, I]."""

    weight: Tensor
    """As the layer computes with it."""
    rotated: Tensor
    """The latent one, as it was rounded."""
    codes: Tensor
    """Its codes, all the way rounded."""
    share: Tensor
    """Of what is rounded, soft or not, in the weight; 0-dim."""
    slope: Tensor | None
    """Derivative of what is rounded by the latent weight; None where that is straight through."""


def _blend(weight_OI: Tensor, level: Tensor, threshold: Tensor | None, strength: Tensor, ctx: Any) -> _Blend:
    """Round a weight in part.

    `torch.lerp` is exact at both ends: strength 0 is the latent weight and strength 1 the rounded one, bit for bit.
    """
    scale = Scale(level, threshold)
    rotated_OI = rotate_weight(weight_OI) if ctx.rotated else weight_OI
    codes_OI = values_OI = weight_codes(rotated_OI, scale, ctx.config)
    share, slope_OI = strength, None
    if ctx.rounding == "softmax":
        share, is_soft = soft_share(strength), strength < 1
        soft_OI, slope_OI = soft_codes(weight_in_codes(rotated_OI, scale), temperature(strength))
        if threshold is not None:
            slope_OI = slope_OI * over_blocks(level / scale.divisor, weight_OI.shape)
        values_OI, slope_OI = torch.where(is_soft, soft_OI, codes_OI), torch.where(is_soft, slope_OI, 1.0)
    rounded_OI = dequantize(values_OI, level).to(weight_OI.dtype)
    rounded_OI = rotate(rounded_OI) if ctx.rotated else rounded_OI
    blended_OI = torch.lerp(weight_OI, rounded_OI, share.to(weight_OI.dtype))
    return _Blend(blended_OI, rotated_OI, codes_OI, share, slope_OI)


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
