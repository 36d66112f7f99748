"""Rounding rows and columns to int8 codes, and turning codes around.

The twins are `quant.rounding.quantize_activation` and `quantize_rows`, for columns of a transposed product; the bits
are the same. So divisions are rounded to nearest. Weights are rounded by compiled code, which needs about twice the
time that their bytes take, once a step.

Dimensions: N rows, I or O elements of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUND_TO_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23. Added to a small fp32 number and taken away, it leaves the nearest integer, of two the even one."""


@triton.jit
def _nearest(x):
    return (x + ROUND_TO_EVEN) - ROUND_TO_EVEN


@triton.jit
def bf16_value(x):
    """The bf16 cast of fp32, as fp32, by its bits."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_bf16(x):
    """The bf16 cast of fp32; Triton's interpreter casts towards 0."""
    return (bf16_value(x) if INTERPRETED else x).to(tl.bfloat16)


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
        x_NI: fp32 or bf16, with rows in one piece and at most `quant.size.LONGEST_ROW` wide.
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
def _column_peaks(x_ptr, scale_ptr, peaks_ptr, N, O, LENGTH: tl.constexpr, TILE_N: tl.constexpr, TILE_O: tl.constexpr):  # noqa: E741
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    peaks = tl.zeros((TILE_N, TILE_O), dtype=tl.int32)
    for start in range(0, LENGTH, TILE_N):
        n = tl.program_id(1).to(tl.int64) * LENGTH + start + tl.arange(0, TILE_N)
        x = tl.load(x_ptr + n[:, None] * O + o[None, :], mask=(n < N)[:, None] & (o < O)[None, :], other=0.0)
        x = x.to(tl.float32) * tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        # Bits of magnitudes are in the order of these, with NaN above all.
        peaks = tl.maximum(peaks, tl.abs(x).to(tl.int32, bitcast=True))
    tl.atomic_max(peaks_ptr + o, tl.max(peaks, 0), mask=o < O)


@triton.jit
def _quantize_columns(
    x_ptr,
    scale_ptr,
    peaks_ptr,
    codes_ptr,
    largest_ptr,
    N,
    O,  # noqa: E741
    smallest,
    highest,
    TILE_N: tl.constexpr,
    TILE_O: tl.constexpr,
):
    n, o = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N), tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * O + o[None, :], mask=(n < N)[:, None] & (o < O)[None, :], other=0.0)
    x = x.to(tl.float32) * tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    largest = tl.load(peaks_ptr + o, mask=o < O, other=0).to(tl.float32, bitcast=True)
    largest = tl.where(largest != largest, largest, tl.maximum(largest, smallest))
    codes = _nearest(x * (tl.div_rn(1.0, largest) * highest)[None, :])
    codes = tl.minimum(tl.maximum(codes, -highest), highest).to(tl.int8)
    codes_ptrs = codes_ptr + o.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(codes_ptrs, tl.trans(codes), mask=(o < O)[:, None] & (n < N)[None, :])
    if tl.program_id(0) == 0:
        tl.store(largest_ptr + o, tl.div_rn(largest, highest), mask=o < O)


def quantize_columns(x_NO: Tensor, scale_N1: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Quantize the columns of ``x * scale`` to -127 to 127 by the largest magnitude of each.

    Args:
        x_NO: fp32 or bf16, in one piece.
        scale_N1: fp32.
        smallest: floor of the largest magnitude.

    Returns:
        int8 codes [O, N], in one piece, and fp32 scales [O, 1].
    """
    N, O = x_NO.shape  # noqa: E741
    peaks_O = torch.zeros(O, dtype=torch.int32, device=x_NO.device)
    codes_ON = torch.empty(O, N, dtype=torch.int8, device=x_NO.device)
    scale_O1 = torch.empty(O, 1, dtype=torch.float32, device=x_NO.device)
    length = 512
    _column_peaks[(triton.cdiv(O, 128), triton.cdiv(N, length))](
        x_NO, scale_N1, peaks_O, N, O, LENGTH=length, TILE_N=64, TILE_O=128, num_warps=8, enable_fp_fusion=False
    )
    _quantize_columns[(triton.cdiv(N, 128), triton.cdiv(O, 64))](
        x_NO, scale_N1, peaks_O, codes_ON, scale_O1, N, O, smallest, 127.0, TILE_N=128, TILE_O=64,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes_ON, scale_O1


@triton.jit
def _transposed(x_ptr, y_ptr, N, I, TILE_N: tl.constexpr, TILE_I: tl.constexpr):  # noqa: E741
    n, i = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N), tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * I + i[None, :], mask=(n < N)[:, None] & (i < I)[None, :], other=0)
    tl.store(y_ptr + i.to(tl.int64)[:, None] * N + n[None, :], tl.trans(x), mask=(i < I)[:, None] & (n < N)[None, :])


def transposed(codes_NI: Tensor) -> Tensor:
    """``codes.T`` in one piece, int8 [I, N]."""
    N, I = codes_NI.shape  # noqa: E741
    codes_IN = torch.empty(I, N, dtype=codes_NI.dtype, device=codes_NI.device)
    _transposed[(triton.cdiv(N, 128), triton.cdiv(I, 128))](codes_NI, codes_IN, N, I, TILE_N=128, TILE_I=128)
    return codes_IN
