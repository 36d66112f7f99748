"""Folders in the format of the `compressed-tensors` package, which Transformers, vLLM and SGLang load."""

from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor

from launcher.formats.codes import CodedMatrices
from launcher.formats.hf_folder import Stored
from model.size import is_projection
from quant.compressed_tensors import CODES_PER_WORD, FORMAT, InputBits, scheme, to_words
from quant.config import QuantConfig


def compressed_config(
    config: QuantConfig, coded: Container[str], names: Iterable[str], inputs: InputBits
) -> dict[str, object]:
    """The `quantization_config` of a model.

    Args:
        config: the recipe.
        coded: names of the matrices that are quantized.
        names: of all parameters.
        inputs: what is done to the inputs of quantized layers.
    """
    left_out = [name.removesuffix(".weight") for name in names if is_projection(name) and name not in coded]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": scheme(config, inputs),
        "ignore": ["lm_head", *left_out],
    }


def compressed(tensor: Stored, matrices: CodedMatrices) -> list[Stored]:
    """A matrix as its words, its scales, which are always fp32, and its shape."""
    O, I = tensor.shape  # noqa: E741
    layer = tensor.name.removesuffix(".weight")
    config = matrices.config
    groups = I // config.group_size if config.granularity == "group" else 1
    scales: list[Tensor] = []

    def words() -> Iterator[Tensor]:
        packed, scale = to_words(*matrices.codes(tensor.name))
        scales.append(scale)
        yield packed

    return [
        Stored(f"{layer}.weight_packed", torch.int32, (O, -(-I // CODES_PER_WORD)), words()),
        Stored(f"{layer}.weight_scale", torch.float32, (O, groups), scales),  # filled by then: words are written first
        Stored(f"{layer}.weight_shape", torch.int64, (2,), [torch.tensor(tensor.shape)]),
    ]
