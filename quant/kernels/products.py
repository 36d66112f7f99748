"""Products of int8 codes with the scales in the epilogue: sums never leave the chip as int32.

The twin is `quant.product.integer_product` times the scales. Sums are exact and scales are multiplied in the same
order, so that the bits are the same.

Dimensions: M rows and N columns of the result, K terms of a sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.rounding import bf16_value


class Tiles(NamedTuple):
    """How a product is cut into pieces."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


TILES = (
    Tiles(128, 256, 128, 8, 3),
    Tiles(128, 128, 128, 8, 4),
    Tiles(128, 128, 64, 4, 4),
    Tiles(64, 256, 128, 4, 4),
    Tiles(64, 64, 128, 4, 4),
    Tiles(16, 64, 128, 4, 5),
)
"""What is worth a try; which is fastest depends on the shape and the device."""

BAND = 8
"""Rows of tiles that are computed together, so that what they read stays in the L2 cache."""


@triton.jit
def _scaled_product(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    column_scale_ptr,
    c_ptr,
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_n,
    b_stride_k,
    row_stride,
    column_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    per_band = BAND * tiles_n
    first_m = program // per_band * BAND
    height = tl.minimum(tiles_m - first_m, BAND)
    tile_m = first_m + program % per_band % height
    tile_n = program % per_band // height

    m = (tile_m * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    n = (tile_n * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    k = tl.arange(0, TILE_K).to(tl.int64)
    a_ptrs = a_ptr + m[:, None] * a_stride_m + k[None, :] * a_stride_k
    b_ptrs = b_ptr + n[None, :] * b_stride_n + k[:, None] * b_stride_k
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for start in range(0, K, TILE_K):
        inside = k < K - start
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & inside[None, :], other=0)
        b = tl.load(b_ptrs, mask=(n < N)[None, :] & inside[:, None], other=0)
        sums = tl.dot(a, b, acc=sums, out_dtype=tl.int32)
        a_ptrs += TILE_K * a_stride_k
        b_ptrs += TILE_K * b_stride_k
    row_scale = tl.load(row_scale_ptr + m * row_stride, mask=m < M, other=0.0)
    column_scale = tl.load(column_scale_ptr + n * column_stride, mask=n < N, other=0.0)
    c = sums.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    if c_ptr.dtype.element_ty == tl.bfloat16:
        c = bf16_value(c)
    c_ptrs = c_ptr + m[:, None] * N + n[None, :]
    tl.store(c_ptrs, c.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def scaled_product(
    a_MK: Tensor, b_NK: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype, tiles: Tiles = TILES[2]
) -> Tensor:
    """``(a @ b.T) * row_scale[:, None] * column_scale`` of int8 codes, [M, N].

    Args:
        a_MK: int8, with any strides.
        b_NK: int8, with any strides.
        row_scale: fp32, of M elements, or one.
        column_scale: fp32, of N elements, or one.
        dtype: of the result.
        tiles: how it is computed, which does not change the result.
    """
    (M, K), N = a_MK.shape, len(b_NK)
    c_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    rows, columns = row_scale.reshape(-1), column_scale.reshape(-1)
    _scaled_product[(triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n),)](
        a_MK,
        b_NK,
        rows,
        columns,
        c_MN,
        M,
        N,
        K,
        *a_MK.stride(),
        *b_NK.stride(),
        int(len(rows) > 1),
        int(len(columns) > 1),
        TILE_M=tiles.m,
        TILE_N=tiles.n,
        TILE_K=tiles.k,
        BAND=BAND,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=False,
    )
    return c_MN
