"""Write matrices as MLX's affine quantization in 2 bits has them; say which recipes it holds exactly.

A weight is ``scale * bits + bias``, with a scale and a bias for each group of neighbors in a row. With the level as the
scale, minus the level as the bias, and the code plus 1 as the bits, that is the code times its level, exactly: only 0
and twice the level are added to minus the level. Sixteen codes are in a uint32 from the low bits up
(github.com/ml-explore/mlx, `mlx/ops.cpp`, `affine_quantize`).

Dimensions: O output features, I input features, W words of a row, G groups of a row.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quant.config import QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

BITS = 2
CODES_PER_WORD = 16
GROUP_SIZES = (128, 64, 32)
"""Weights in a group, the largest first: it takes the least memory."""


def group_size_for(widths: Iterable[int], config: QuantConfig) -> int | None:
    """The size of the groups of a whole model; None if none divides its rows, and the recipe's groups.

    Args:
        widths: of the rows of all coded matrices.
        config: of these.
    """
    units = {*widths} | ({config.group_size} if config.granularity == "group" else set())
    return next((size for size in GROUP_SIZES if not any(unit % size for unit in units)), None)


def mlx_bytes(shape: tuple[int, ...], group_size: int, element_bytes: int) -> int:
    """Bytes of a matrix: its words, and the scales and biases of its groups."""
    O, I = shape  # noqa: E741
    return 4 * O * (I // CODES_PER_WORD) + 2 * element_bytes * O * (I // group_size)


def to_groups(codes_OI: "Tensor", level: "Tensor", group_size: int) -> tuple["Tensor", "Tensor"]:
    """The words of a matrix, uint32 [O, W], and the scale of each group, fp32 [O, G].

    Args:
        codes_OI: -1, 0 and +1.
        level: [1, 1], [O, 1] or [O, groups of the recipe].
        group_size: divides the rows, and the recipe's groups.
    """
    import torch

    from quant.codes import pack_neighbors

    O, I = codes_OI.shape  # noqa: E741
    G = I // group_size
    scale_OG = (level if level.shape[1] == 1 else level.repeat_interleave(G // level.shape[1], 1)).expand(O, G)
    return pack_neighbors(codes_OI, zero=1).view(torch.uint32), scale_OG.contiguous()
