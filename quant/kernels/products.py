"""Products of int8 codes with the scales in the epilogue: sums never leave the chip as int32.

The twin is `quant.integers.integer_product` times the scales. Sums are exact and scales are multiplied in the same
order, so that the bits are the same, whatever way is taken. Both operands have the terms of a sum in one piece: tensor
cores for int8 read no other layout, and to turn tiles around in each product takes five times as long as it does.

Dimensions: M rows and N columns of the result, K terms of a sum.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quant.kernels.rounding import to_bf16


class Way(NamedTuple):
    """How a product is cut into tiles."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    streamed: bool = False
    """Whether the tensor memory unit of Hopper and later copies the tiles, for programs that stay for all of theirs and
    read the next tile while they write the last."""


WAYS = (
    Way(64, 64, 128, 4, 4),
    Way(16, 64, 128, 4, 5),
    Way(128, 128, 128, 4, 4),
    Way(128, 256, 128, 8, 3),
    Way(128, 256, 128, 8, 3, streamed=True),
    Way(128, 128, 128, 4, 4, streamed=True),
)
"""What is worth a try; which is fastest depends on the shape and the device. The first fits any."""

BAND = 16
"""Rows of tiles that are computed together, so that what they read stays in the L2 cache."""


@triton.jit
def _place(tile, M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """First row and first column of a tile."""
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    per_band = BAND * tiles_n
    first = tile // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    return (first + tile % per_band % height) * TILE_M, tile % per_band // height * TILE_N


@triton.jit
def _scaled(sums, m, n, row_scale_ptr, column_scale_ptr, M, N, ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr):
    rows = tl.load(row_scale_ptr + m * ROW_STRIDE, mask=m < M, other=0.0)
    columns = tl.load(column_scale_ptr + n * COLUMN_STRIDE, mask=n < N, other=0.0)
    return sums.to(tl.float32) * (rows[:, None] * columns[None, :])


@triton.jit
def _by_pointers(
    a_ptr,
    b_ptr,
    row_scale_ptr,
    column_scale_ptr,
    c_ptr,
    M,
    N,
    K,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    first_m, first_n = _place(tl.program_id(0), M, N, TILE_M, TILE_N, BAND)
    m, n, k = first_m + tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    # Rows beyond the last are read as the first ones again, and not written.
    a_ptrs = a_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for start in range(0, K, TILE_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs + start), tl.load(b_ptrs + start)
        else:
            a = tl.load(a_ptrs + start, mask=(k < K - start)[None, :], other=0)
            b = tl.load(b_ptrs + start, mask=(k < K - start)[:, None], other=0)
        sums = tl.dot(a, b, acc=sums, out_dtype=tl.int32)
    c = _scaled(sums, m, n, row_scale_ptr, column_scale_ptr, M, N, ROW_STRIDE, COLUMN_STRIDE)
    c = to_bf16(c) if c_ptr.dtype.element_ty == tl.bfloat16 else c.to(c_ptr.dtype.element_ty)
    c_ptrs = c_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(c_ptrs, c, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _streamed(
    a_tiles,
    b_tiles,
    row_scale_ptr,
    column_scale_ptr,
    c_tiles,
    M,
    N,
    K,
    NUM_PROGRAMS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
):
    num_tiles = tl.cdiv(M, TILE_M) * tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=True):
        first_m, first_n = _place(tile, M, N, TILE_M, TILE_N, BAND)
        sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
        for start in range(0, K, TILE_K):
            a, b = a_tiles.load([first_m, start]), b_tiles.load([first_n, start])
            sums = tl.dot(a, b.T, acc=sums, out_dtype=tl.int32)
        m, n = first_m + tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N)
        c = _scaled(sums, m, n, row_scale_ptr, column_scale_ptr, M, N, ROW_STRIDE, COLUMN_STRIDE)
        c_tiles.store([first_m, first_n], to_bf16(c) if c_tiles.dtype == tl.bfloat16 else c.to(c_tiles.dtype))


_properties = functools.cache(torch.cuda.get_device_properties)


def can_stream(a_MK: Tensor, b_NK: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor memory unit can copy tiles of these: it is there, and rows begin at multiples of 16 bytes."""
    if a_MK.device.type == "cuda" and _properties(a_MK.device).major < 9:
        return False
    aligned = a_MK.data_ptr() % 16 == b_NK.data_ptr() % 16 == 0
    return aligned and a_MK.shape[1] % 16 == 0 and len(b_NK) * dtype.itemsize % 16 == 0


def scaled_product(
    a_MK: Tensor, b_NK: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype, way: Way = WAYS[0]
) -> Tensor:
    """``(a @ b.T) * row_scale[:, None] * column_scale`` of int8 codes, [M, N].

    Args:
        a_MK: int8, in one piece.
        b_NK: int8, in one piece.
        row_scale: fp32, of M elements, or one.
        column_scale: fp32, of N elements, or one.
        dtype: of the result.
        way: how it is computed, which does not change the result.

    Raises:
        ValueError: an operand is not in one piece, the numbers of terms differ, or the way is not for operands like
            these, see `can_stream`.
    """
    if not (a_MK.is_contiguous() and b_NK.is_contiguous()):
        raise ValueError(f"operands with strides {a_MK.stride()} and {b_NK.stride()}; must be in one piece")
    (M, K), N = a_MK.shape, len(b_NK)
    if b_NK.shape[1] != K:
        raise ValueError(f"rows of {K} and of {b_NK.shape[1]} codes cannot be multiplied")
    c_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    num_tiles = triton.cdiv(M, way.m) * triton.cdiv(N, way.n)
    strides = {"ROW_STRIDE": int(row_scale.numel() > 1), "COLUMN_STRIDE": int(column_scale.numel() > 1)}
    how = {"TILE_M": way.m, "TILE_N": way.n, "TILE_K": way.k, "BAND": BAND, **strides}
    how |= {"num_warps": way.num_warps, "num_stages": way.num_stages, "enable_fp_fusion": False}
    if not way.streamed:
        _by_pointers[(num_tiles,)](a_MK, b_NK, row_scale, column_scale, c_MN, M, N, K, EVEN_K=K % way.k == 0, **how)
        return c_MN
    if not can_stream(a_MK, b_NK, dtype):
        raise ValueError("rows must begin at multiples of 16 bytes, on a GPU like Hopper or later")
    processors = _properties(a_MK.device).multi_processor_count if a_MK.device.type == "cuda" else 2
    _streamed[(min(processors, num_tiles),)](
        TensorDescriptor.from_tensor(a_MK, [way.m, way.k]),
        TensorDescriptor.from_tensor(b_NK, [way.n, way.k]),
        row_scale,
        column_scale,
        TensorDescriptor.from_tensor(c_MN, [way.m, way.n]),
        M,
        N,
        K,
        NUM_PROGRAMS=processors,
        **how,
    )
    return c_MN
