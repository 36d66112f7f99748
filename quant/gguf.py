"""Write matrices as blocks of GGUF's types; say which recipes these hold exactly.

TQ2_0 and TQ1_0 have one scale, in half precision, for 256 neighbors of a row, and codes -1, 0 and +1 in 2 bits, or in
1.6 as digits to base 3. Q2_0 has one for 64 neighbors, and codes in 2 bits. Every code is kept; a level is rounded to
half precision. F16 and Q8_0 (8 bits, a scale for 32 neighbors) hold any weights with their rounding errors. The layouts
are those of ggml (github.com/ggml-org/ggml, `ggml-quants.c`) as the `gguf` package writes them, but for Q2_0, which
`gguf` 0.19 does not know. A fork of llama.cpp has a Q2_0 with blocks of 128, which is another type.

The quantizers take the largest magnitude of a block as the scale. That is the level where a block has a code other
than 0, so codes times their level are kept, while latent weights would be rounded to something else.
"""

from typing import TYPE_CHECKING, Literal, cast

from quant.config import IN_2_BITS, QuantConfig

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray
    from torch import Tensor

BlockType = Literal["tq2_0", "q2_0", "tq1_0", "q8_0", "f16"]
BLOCK_TYPES: tuple[BlockType, ...] = ("tq2_0", "q2_0", "tq1_0", "q8_0", "f16")
"""What a user may choose for matrices."""
EmbeddingType = Literal["q8_0", "f16"]
"""What the embedding and the head of a GGUF file may be."""
StoredType = BlockType | Literal["f32"]
"""Vectors stay in fp32."""
TERNARY_TYPES: tuple[BlockType, ...] = ("tq2_0", "q2_0", "tq1_0")
BLOCK_WIDTHS: dict[StoredType, int] = {"tq2_0": 256, "q2_0": 64, "tq1_0": 256, "q8_0": 32, "f16": 1, "f32": 1}
"""Neighbors of a row in a block; divides the rows."""
BLOCK_BYTES: dict[StoredType, int] = {"tq2_0": 66, "q2_0": 18, "tq1_0": 54, "q8_0": 34, "f16": 2, "f32": 4}
"""Bytes of a block: its codes and its scale."""
Device = Literal["gpu", "x86", "phone"]
"""What a file is to run on."""
TYPES_OF_DEVICES: dict[Device, BlockType] = {"gpu": "q2_0", "x86": "tq2_0", "phone": "q2_0"}
"""The fastest ternary type: llama.cpp has Q2_0 on CUDA, Vulkan, Metal and ARM, and TQ2_0 with vectors on x86."""
Q2_0_TYPE, Q2_0_FILE = 42, 28
"""Numbers of Q2_0 in ggml and of its files in llama.cpp."""
LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-14
"""Smallest number that half precision holds with all its digits; far below it, numbers become 0."""
Q8_LEVELS = 127


def recipe_problem(config: QuantConfig, into: BlockType) -> str | None:
    """Why layers quantized like this are no plain product of what blocks of this type hold; None if they are."""
    if config.hadamard != "none":
        return f"hadamard {config.hadamard}: llama.cpp does not rotate the inputs of a layer"
    if config.layer_norm:
        return "layer_norm true: llama.cpp does not normalize the inputs of each layer"
    if config.dead_zone_bias:
        return f"dead_zone_bias {config.dead_zone_bias}: llama.cpp's graphs have no place for it"
    if into not in TERNARY_TYPES:
        return None
    if config.levels not in IN_2_BITS:
        return f"levels {config.levels}: {into} holds the codes -1, 0 and +1; f16 and q8_0 hold any"
    width = BLOCK_WIDTHS[into]
    if config.granularity == "group" and config.group_size % width:
        return (
            f"group_size {config.group_size}: {into} has one scale for {width} weights; f16 and q8_0 hold any"
            f"{_narrower(config.group_size, into)}"
        )
    return None


def block_width_problem(name: str, width: int, into: StoredType) -> str | None:
    """The reason why rows of this many weights cannot have this type; None if they can."""
    block = BLOCK_WIDTHS[into]
    if width % block:
        return (
            f"{name} has rows of {width} weights; {into} has blocks of {block}, which must divide them"
            f"{_narrower(width, into)}"
        )
    return None


def _narrower(width: int, into: StoredType) -> str:
    """The end of a sentence, which names Q2_0 if its blocks fit where those of a wider ternary type do not."""
    block = BLOCK_WIDTHS["q2_0"]
    return f"; q2_0 has blocks of {block}, which fit" if into in TERNARY_TYPES and width % block == 0 else ""


def ggml_type(into: StoredType) -> "GGMLQuantizationType":
    """The type by the name that the `gguf` package has for it; if it has none, the number, which it writes as well."""
    from gguf import GGMLQuantizationType

    return cast(GGMLQuantizationType, Q2_0_TYPE) if into == "q2_0" else GGMLQuantizationType[into.upper()]


def file_type(into: BlockType) -> int:
    """The number that a file says its type with."""
    from gguf import LlamaFileType

    return Q2_0_FILE if into == "q2_0" else int(LlamaFileType[f"MOSTLY_{into.upper()}"])


def to_blocks(values: "Tensor", into: StoredType) -> "NDArray[np.generic]":
    """Write weights as blocks.

    Args:
        values: [..., I]; for the ternary types codes times their level.
        into: type of the blocks.

    Returns:
        float16 or float32 of the same shape, or uint8 [..., bytes of a row].

    Raises:
        ValueError: a value is no number, or too large for half precision, or all are too small for it.
    """
    from gguf.quants import quantize

    if into != "f32" and not (largest := values.abs().max().item()) <= LARGEST_HALF:
        raise ValueError(f"the largest magnitude is {largest}, but half precision ends at {LARGEST_HALF:.0f}")
    if into != "f32" and 0 < largest / (Q8_LEVELS if into == "q8_0" else 1) < SMALLEST_HALF / 256:
        raise ValueError(f"the largest magnitude is {largest}, which half precision rounds to 0, or coarsely")
    if into == "q2_0":
        return _to_q2_0(values.float())
    blocks: NDArray[np.generic] = quantize(values.float().contiguous().numpy(), ggml_type(into))
    return blocks


def _to_q2_0(values: "Tensor") -> "NDArray[np.generic]":
    import torch

    from quant.codes import pack_neighbors

    blocks = values.reshape(-1, BLOCK_WIDTHS["q2_0"])
    scale = blocks.abs().amax(1, keepdim=True).half().view(torch.uint8)
    packed = pack_neighbors(blocks.sign().to(torch.int8), zero=1)
    return torch.cat([scale, packed], 1).view(*values.shape[:-1], -1).numpy()
