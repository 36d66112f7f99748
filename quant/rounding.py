"""Pure quantizers: tensor in, integer codes and scale out.

All statistics and the rounding are computed in fp32 from the bf16 cast of the input, whatever its own precision,
so that every engine, kernel and export sees the same codes: rounding the fp32 master weights instead changes 0.04 to
0.2 % of the codes, statistics in bf16 another 0.2 %.

Dimensions: O output features, I input features, D the quantized dimension of an activation.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

WeightQuantizer = Literal["absmean", "absmedian"]

SMALLEST_SCALE = 1e-5
"""Floor of every scale, so that an all-zero tensor quantizes to zeros (BitNet b1.58 uses the same value)."""

INT8_LIMIT = 127


def _bf16_values(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def ternary_codes(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Round ``weight / scale`` to the nearest of -1, 0, +1 (ties to even); fp32 of the same shape.

    Multiplies by the reciprocal, as Transformers' BitNet layers do: the quotient may round to the other side of a tie.
    """
    return (_bf16_values(weight_OI) * scale.reciprocal()).round().clamp(-1, 1)


def absmean_scale(weight_OI: Tensor) -> Tensor:
    """Mean magnitude of the whole matrix, a 0-dim fp32 tensor (arXiv 2402.17764, eq. 3)."""
    return _bf16_values(weight_OI).abs().mean().clamp(min=SMALLEST_SCALE)


def absmedian_scale(weight_OI: Tensor) -> Tensor:
    """Median magnitude of the whole matrix, the lower one of two, a 0-dim fp32 tensor (arXiv 2407.09527, section 3)."""
    return _bf16_values(weight_OI).abs().median().clamp(min=SMALLEST_SCALE)


WEIGHT_SCALES: dict[WeightQuantizer, Callable[[Tensor], Tensor]] = {
    "absmean": absmean_scale,
    "absmedian": absmedian_scale,
}


def ternary(weight_OI: Tensor, quantizer: WeightQuantizer = "absmean") -> tuple[Tensor, Tensor]:
    """Quantize a weight matrix to 1.58 bits with one scale.

    Returns:
        codes_OI in {-1, 0, +1} as fp32, and the 0-dim fp32 scale; ``codes * scale`` approximates the weight.
    """
    scale = WEIGHT_SCALES[quantizer](weight_OI)
    return ternary_codes(weight_OI, scale), scale


def int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations to 8 bits, symmetric, one scale for each row of the last dimension.

    Source: arXiv 2402.17764, section 2 (absmax to [-127, 127]; no zero point).

    Returns:
        codes in [-127, 127] as fp32, of the shape of ``x``, and the fp32 scale with a last dimension of 1.
    """
    x = _bf16_values(x)
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    codes = (x * (INT8_LIMIT / largest)).round().clamp(-INT8_LIMIT, INT8_LIMIT)
    return codes, largest / INT8_LIMIT


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Stand-in."""
    return codes * scale
