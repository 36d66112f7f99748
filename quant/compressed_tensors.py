"""Write matrices as the `compressed-tensors` package packs 2-bit integers (`pack-quantized`).

A weight is a signed integer times a scale. The integer plus 2 takes 2 bits, sixteen are in an int32 from the low bits
up, and what is left over in the last one has no bits set (github.com/vllm-project/compressed-tensors,
`compressors/pack_quantized`). The scale is one of a row, or of a group of neighbors in it. A matrix with one scale has
it once for each row: vLLM has no kernels of 2 bits for a scale of the whole matrix.
"""

from typing import TYPE_CHECKING, Any, Literal

from quant.config import Activations, QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "pack-quantized"
CODES_PER_WORD = 16

InputBits = Literal["int8", "none"]
"""What is done to the inputs of a layer: rounded to 8 bits, absmax per token, or left in 16 bits."""

ROUNDED: tuple[Activations, ...] = ("int8-127.5", "int8")
"""Grids of activations that some program has for `int8`: Transformers the first, the Humming kernels of vLLM and SGLang
the second."""


def default_inputs(config: QuantConfig) -> InputBits:
    """What Transformers should do to inputs, to compute as training did where it can."""
    return "int8" if config.activations == "int8-127.5" else "none"


def compressed_bytes(shape: tuple[int, ...], config: QuantConfig) -> int:
    """Bytes of a matrix: its words and its scales in fp32."""
    O, I = shape  # noqa: E741
    groups = I // config.group_size if config.granularity == "group" else 1
    return 4 * O * (-(-I // CODES_PER_WORD) + groups)


def scheme(config: QuantConfig, inputs: InputBits) -> dict[str, Any]:
    """The `config_groups` of a `quantization_config`: all linear layers that it does not leave out."""
    integers: dict[str, Any] = {"type": "int", "symmetric": True}
    grouped = config.granularity == "group"
    weights = integers | {
        "num_bits": 2,
        "strategy": "group" if grouped else "channel",
        "group_size": config.group_size if grouped else None,
        "dynamic": False,
    }
    rounded = integers | {"num_bits": 8, "strategy": "token", "group_size": None, "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": rounded if inputs == "int8" else None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {"group_0": group}


def to_words(codes_OI: "Tensor", level: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The words of a matrix, int32 [O, words of a row], and its scales, fp32 [O, 1] or [O, groups of a row].

    Args:
        codes_OI: -1, 0 and +1.
        level: [1, 1], [O, 1] or [O, groups of a row].
    """
    import torch

    from quant.codes import pack_neighbors

    packed = pack_neighbors(codes_OI, zero=2, bytes_of_word=4)
    return packed.view(torch.int32), level.expand(len(codes_OI), -1).contiguous()
