"""Rounding to codes: rows of inputs or gradients to int8, and weights to packed ternary codes.

The twins are `quant.rounding.quantize_activation` and `quantize_rows`, `quant.rounding.row_sums`, and
`quant.codes.pack_rows` of `quant.rounding.weight_codes`; the bits are the same. So divisions are rounded to nearest,
and products are not fused with the sums that follow.

Dimensions: N rows, I elements of a row, J = I / 4 bytes of a packed row, rounded up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUND_TO_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23. Added to a small fp32 number and taken away, it leaves the nearest integer, of two the even one."""

LONGEST_ROW = 2**15
"""Elements of a row that one program holds."""


@triton.jit
def _nearest(x):
    return (x + ROUND_TO_EVEN) - ROUND_TO_EVEN


@triton.jit
def bf16_value(x):
    """The bf16 cast of fp32, as fp32, by its bits: Triton's interpreter casts towards 0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)


@triton.jit
def _quantize_rows(x_ptr, codes_ptr, scale_ptr, I, x_stride, smallest, highest, WIDTH: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * x_stride + i, mask=i < I, other=0.0).to(tl.float32)
    magnitudes = tl.abs(x)
    largest = tl.max(magnitudes)
    largest = tl.where(tl.sum((magnitudes != magnitudes).to(tl.int32)) > 0, float("nan"), tl.maximum(largest, smallest))
    codes = _nearest(x * (tl.div_rn(1.0, largest) * highest))
    codes = tl.minimum(tl.maximum(codes, -highest), highest)
    tl.store(codes_ptr + row * I + i, codes.to(tl.int8), mask=i < I)
    tl.store(scale_ptr + row, tl.div_rn(largest, highest))


def quantize_rows(x_NI: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Quantize rows to -127 to 127 by the largest magnitude of each.

    Args:
        x_NI: fp32 or bf16, with rows in one piece and at most `LONGEST_ROW` wide.
        smallest: floor of the largest magnitude.

    Returns:
        int8 codes [N, I] and fp32 scales [N, 1].
    """
    N, I = x_NI.shape  # noqa: E741
    codes_NI = torch.empty(N, I, dtype=torch.int8, device=x_NI.device)
    scale_N1 = torch.empty(N, 1, dtype=torch.float32, device=x_NI.device)
    width = triton.next_power_of_2(I)
    _quantize_rows[(N,)](
        x_NI,
        codes_NI,
        scale_N1,
        I,
        x_NI.stride(0),
        smallest,
        127.0,
        WIDTH=width,
        num_warps=min(max(width // 512, 1), 32),
        enable_fp_fusion=False,
    )
    return codes_NI, scale_N1


@triton.jit
def _row_sums(w_ptr, sums_ptr, I, SQUARED: tl.constexpr, WIDTH: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(0, I, WIDTH):
        i = start + tl.arange(0, WIDTH)
        w = tl.load(w_ptr + row * I + i, mask=i < I, other=0.0).to(tl.float32)
        w = bf16_value(w)
        total += (w * w if SQUARED else tl.abs(w)).to(tl.float64)
    tl.store(sums_ptr + row, tl.sum(total))


def row_sums(weight_OI: Tensor, *, squared: bool) -> Tensor:
    """Sums of each row's magnitudes, or squares, of the bf16 cast of a weight; fp64 [O]."""
    O, I = weight_OI.shape  # noqa: E741
    sums_O = torch.empty(O, dtype=torch.float64, device=weight_OI.device)
    _row_sums[(O,)](weight_OI, sums_O, I, SQUARED=squared, WIDTH=min(1024, triton.next_power_of_2(I)))
    return sums_O


@triton.jit
def _pack_rows(w_ptr, packed_ptr, level_ptr, I, J, level_stride, WIDTH: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inverse = tl.div_rn(1.0, tl.load(level_ptr + row * level_stride))
    packed = tl.zeros((WIDTH,), dtype=tl.int32)
    for part in tl.static_range(4):
        i = part * J + j
        w = tl.load(w_ptr + row * I + i, mask=(j < J) & (i < I), other=0.0).to(tl.float32)
        w = bf16_value(w)
        code = tl.minimum(tl.maximum(_nearest(tl.minimum(tl.maximum(w * inverse, -2.0), 2.0)), -1.0), 1.0)
        packed |= tl.where(i < I, code.to(tl.int32) + 1, 0) << 2 * part
    tl.store(packed_ptr + row * J + j, packed.to(tl.uint8), mask=j < J)


def pack_rows(weight_OI: Tensor, level: Tensor) -> Tensor:
    """Packed ternary codes of a weight, uint8 [O, J].

    Args:
        weight_OI: fp32 or bf16, in one piece.
        level: fp32, [1, 1] or [O, 1].
    """
    O, I = weight_OI.shape  # noqa: E741
    J = -(-I // 4)
    packed_OJ = torch.empty(O, J, dtype=torch.uint8, device=weight_OI.device)
    width = min(1024, triton.next_power_of_2(J))
    _pack_rows[(O, triton.cdiv(J, width))](
        weight_OI, packed_OJ, level, I, J, int(len(level) > 1), WIDTH=width, enable_fp_fusion=False
    )
    return packed_OJ
