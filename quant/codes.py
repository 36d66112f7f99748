"""Ternary codes in 2 bits: by rows as in Transformers' BitNet layers, and by columns for gathering.

A byte holds four codes, each plus 1, the first in the lowest bits.

`pack`: of four rows, as they are stored and exported. The rows are not neighbors: with R = O / 4 byte ``[r, i]`` has
column i of the rows r, R + r, 2 R + r and 3 R + r. So each fourth of the matrix, its rows in one piece, is in the same
two bits of all bytes.

`pack_rows`: of four columns, likewise, so that rows stay rows, and any number of them can be packed and sent alone.

`pack_neighbors`: of four neighbors in a row, as other programs' formats have them.

Dimensions: O output features, I input features, R rows of bytes, J = I / 4 columns of bytes, rounded up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.config import IN_2_BITS, Levels
from quant.kernels import avx2
from quant.kernels.avx2 import CPU_HAS_AVX2
from quant.size import CODES_PER_BYTE

CPU_HAS_AVX512 = torch.cpu._is_avx512_supported()
"""Without it, what is compiled for a CPU shifts bytes one by one, in ten times the time that torch's operators take."""

_OPERATORS = torch.library.Library("tritrain", "FRAGMENT")
_OPERATORS.define("unpack_rows(Tensor packed_OJ, int width) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_OPERATORS, "unpack_rows", "CPU")
def _(packed_OJ: Tensor, width: int) -> Tensor:
    codes_OI = avx2.unpack_rows(packed_OJ, width) if CPU_HAS_AVX2 else None
    if codes_OI is None:
        codes_OI = _unpack_rows(packed_OJ, width).contiguous()  # of a new tensor, where no column is cut off too
    return codes_OI


@torch.library.register_fake("tritrain::unpack_rows", lib=_OPERATORS)
def _(packed_OJ: Tensor, width: int) -> Tensor:
    return packed_OJ.new_empty(len(packed_OJ), width, dtype=torch.int8)


def pack(codes_OI: Tensor) -> Tensor:
    """Pack codes -1, 0 and +1 of any dtype; uint8 of a fourth of the rows.

    Raises:
        ValueError: the number of rows is no multiple of 4, or there is another value.
    """
    if len(codes_OI) % CODES_PER_BYTE:
        raise ValueError(f"{len(codes_OI)} rows cannot be packed; the number must be a multiple of {CODES_PER_BYTE}")
    _check_ternary(codes_OI)
    packed_RI, *others = (codes_OI + 1).to(torch.uint8).chunk(CODES_PER_BYTE)
    for block, bits_RI in enumerate(others, start=1):
        packed_RI = packed_RI | bits_RI << 2 * block
    return packed_RI.contiguous()


def unpack(packed_RI: Tensor) -> Tensor:
    """Undo `pack`; int8 of four times the rows.

    Raises:
        ValueError: a byte is none that `pack` makes.
    """
    return torch.cat([unpack_block(packed_RI, block) for block in range(CODES_PER_BYTE)])


def unpack_block(packed: Tensor, block: int) -> Tensor:
    """Codes of one fourth of the rows; of any bytes, so that a range of a matrix needs no more than its own.

    Args:
        packed: uint8 of any shape.
        block: 0 to 3; rows ``block * R`` up to ``(block + 1) * R``.

    Returns:
        int8 of the shape of ``packed``.

    Raises:
        ValueError: a byte is none that `pack` makes.
    """
    bits = (packed >> 2 * block) & 3
    if (bits == 3).any():
        raise ValueError("a packed byte holds a code other than -1, 0 and +1")
    return bits.to(torch.int8) - 1


def pack_rows(codes_OI: Tensor) -> Tensor:
    """Pack the codes -1, 0 and +1 of any dtype row by row; uint8 [O, J]. It does not look for other values.

    Bits are put together in fp32, exactly. Compiled for a CPU, that is faster than shifts of bytes.
    """
    width = -(-codes_OI.shape[1] // CODES_PER_BYTE)
    padded = F.pad(codes_OI.float() + 1, (0, CODES_PER_BYTE * width - codes_OI.shape[1]))
    packed_OJ, *others = padded.split(width, 1)
    for column, bits_OJ in enumerate(others, start=1):
        packed_OJ = packed_OJ.add(bits_OJ, alpha=4**column)
    return packed_OJ.to(torch.uint8)


def unpack_rows(packed_OJ: Tensor, width: int) -> Tensor:
    """Undo `pack_rows`; int8 [O, width]."""
    if torch.compiler.is_compiling() and packed_OJ.device.type == "cpu" and not CPU_HAS_AVX512:
        return torch.ops.tritrain.unpack_rows(packed_OJ, width)
    return _unpack_rows(packed_OJ, width)


def _unpack_rows(packed_OJ: Tensor, width: int) -> Tensor:
    shifts = 2 * torch.arange(CODES_PER_BYTE, dtype=torch.uint8, device=packed_OJ.device)
    bits = packed_OJ[:, None] >> shifts[:, None]
    return bits.bitwise_and_(3).view(torch.int8).sub_(1).flatten(1)[:, :width]


def to_held(codes_OI: Tensor, levels: Levels) -> Tensor:
    """Codes of a weight as they are held and sent: `pack_rows` of them if they fit 2 bits, else int8."""
    return pack_rows(codes_OI) if levels in IN_2_BITS else codes_OI.to(torch.int8)


def from_held(held: Tensor, width: int) -> Tensor:
    """Undo `to_held`; int8 [O, width]."""
    return held if held.dtype == torch.int8 else unpack_rows(held, width)


def pack_neighbors(codes_OI: Tensor, *, zero: int, bytes_of_word: int = 1) -> Tensor:
    """Pack the codes -1, 0 and +1 of neighbors in a row; uint8 [O, bytes of a row], whole words.

    Bytes are in the order of the codes, so on a little-endian machine, words of several bytes have them from the low
    bits up as well.

    Args:
        codes_OI: of any dtype.
        zero: the bits that stand for 0; 1 or 2.
        bytes_of_word: a row takes a multiple of it. What is left over has no bits set.

    Raises:
        ValueError: there is another code.
    """
    _check_ternary(codes_OI)
    padding = -codes_OI.shape[1] % (CODES_PER_BYTE * bytes_of_word)
    bits_OJ4 = F.pad((codes_OI + zero).to(torch.uint8), (0, padding)).unflatten(1, (-1, CODES_PER_BYTE))
    packed_OJ = bits_OJ4[..., 0].clone()
    for place in range(1, CODES_PER_BYTE):
        packed_OJ |= bits_OJ4[..., place] << 2 * place
    return packed_OJ


def unpack_neighbors(packed_OJ: Tensor, bits: int = 2) -> Tensor:
    """Unsigned integers of a few bits that are in bytes from the low bits up; uint8 [O, J * 8 / bits].

    Args:
        packed_OJ: uint8.
        bits: of each; 2, 4 or 8.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_OJ.device)
    return (packed_OJ[..., None] >> shifts).bitwise_and_(2**bits - 1).flatten(-2)


def _check_ternary(codes: Tensor) -> None:
    if not torch.isin(codes, torch.tensor([-1, 0, 1], dtype=codes.dtype, device=codes.device)).all():
        raise ValueError("codes must be -1, 0 or +1")
