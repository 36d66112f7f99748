"""Rotate by Hadamard matrices, which spreads outliers over a row before rounding (BitNet v2, QuEST).

A row is rotated in pieces of the largest power of two, up to 2**14, that divides it. The matrix is Sylvester's, divided
by the root of its size: symmetric, orthogonal, and so its own inverse.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from quant.config import is_rotatable
from quant.rounding import bf16_values, without_autocast

LARGEST_FACTOR = 128
"""A larger matrix is the Kronecker product of two, so that a row costs a few hundred multiply-adds an element."""


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension, in fp32 (fp64 of fp64); the result has the input's dtype. Undoes itself.

    Raises:
        ValueError: the width is odd.
    """
    width = x.shape[-1]
    if not is_rotatable(width):
        raise ValueError(f"a width of {width} cannot be rotated; it must be even")
    size = min(width & -width, LARGEST_FACTOR**2)
    inner = min(size, LARGEST_FACTOR)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        pieces = wide.reshape(*x.shape[:-1], width // size, size // inner, inner) @ _hadamard(inner, wide)
        if size > inner:
            pieces = _hadamard(size // inner, wide) @ pieces
    rotated = pieces.reshape(x.shape)
    return _CastToBf16.apply(rotated) if x.dtype == torch.bfloat16 else rotated.to(x.dtype)


def rotate_weight(weight_OI: Tensor) -> Tensor:
    """Rotate a weight that is to be rounded: its bf16 values, so that codes are the same whatever a run computes in."""
    return rotate(weight_OI if weight_OI.dtype == torch.bfloat16 else _Bf16Values.apply(weight_OI))


class _Bf16Values(torch.autograd.Function):
    """The values of the cast to bf16, with the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return bf16_values(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _CastToBf16(torch.autograd.Function):
    """The cast to bf16, which `bf16_values` keeps in compiled code, with the gradient of a cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return bf16_values(x).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


def _hadamard(size: int, like: Tensor) -> Tensor:
    return _table(size).to(like)


@functools.cache
def _table(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
