"""Write matrices as ONNX Runtime's operator MatMulNBits has them in 2 bits; say which recipes it holds exactly.

A weight is ``(bits - 2) * scale``, with a scale for each block of neighbors in a row, so the bits are the code plus 2.
Four are in a byte from the low bits up, and a row that ends within a block is filled up
(github.com/microsoft/onnxruntime, `docs/ContribOperators.md`, com.microsoft.MatMulNBits).

Dimensions: O output features, I input features, G blocks of a row.
"""

from typing import TYPE_CHECKING

from quant.config import QuantConfig
from quant.size import CODES_PER_BYTE

if TYPE_CHECKING:
    from torch import Tensor

BITS = 2
BLOCK_SIZES = (128, 64, 32, 16)
"""Weights in a block, the largest first."""


def block_size_for(width: int, config: QuantConfig) -> int | None:
    """The size of the blocks of a matrix with rows of ``width`` weights; None if none divides the recipe's groups."""
    if config.granularity == "group":
        return next((size for size in BLOCK_SIZES if not config.group_size % size), None)
    return next((size for size in BLOCK_SIZES if not width % size), BLOCK_SIZES[-1])


def block_shapes(shape: tuple[int, ...], block_size: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """The shapes of a matrix's bytes and of its scales."""
    O, I = shape  # noqa: E741
    G = -(-I // block_size)
    return (O, G, block_size // CODES_PER_BYTE), (O, G)


def onnx_bytes(shape: tuple[int, ...], config: QuantConfig) -> int:
    """Bytes of a matrix: its codes, and the fp32 scales of its blocks."""
    (O, G, num_bytes), _ = block_shapes(shape, block_size_for(shape[1], config) or BLOCK_SIZES[-1])  # noqa: E741
    return O * G * (num_bytes + 4)


def to_blocks(codes_OI: "Tensor", level: "Tensor", block_size: int) -> tuple["Tensor", "Tensor"]:
    """The bytes of a matrix, uint8 [O, G, bytes of a block], and its scales, fp32 [O, G].

    Args:
        codes_OI: -1, 0 and +1.
        level: [1, 1], [O, 1] or [O, groups of the recipe].
        block_size: divides the recipe's groups.
    """
    from quant.codes import pack_neighbors

    bytes_shape, (O, G) = block_shapes(tuple(codes_OI.shape), block_size)  # noqa: E741
    packed = pack_neighbors(codes_OI, zero=2, bytes_of_word=block_size // CODES_PER_BYTE)
    scale_OG = level if level.shape[1] == 1 else level.repeat_interleave(G // level.shape[1], 1)
    return packed.view(bytes_shape), scale_OG.expand(O, G).contiguous()
