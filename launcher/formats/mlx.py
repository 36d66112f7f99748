"""Folders for mlx-lm: Hugging Face's names, and matrices in MLX's affine quantization, see `quant.mlx`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from launcher.formats.codes import CodedMatrices
from launcher.formats.hf_folder import Stored
from quant.mlx import BITS, CODES_PER_WORD, to_groups


def mlx_config(group_size: int) -> dict[str, object]:
    """The `quantization` of a `config.json`; layers without scales in the file stay as they are."""
    return {"group_size": group_size, "bits": BITS, "mode": "affine"}


def grouped(tensor: Stored, matrices: CodedMatrices, group_size: int) -> list[Stored]:
    """A matrix as its words, and the scale and the bias of each group.

    They have the dtype of the rest of the model: MLX computes in the widest dtype that it is given.
    """
    O, I = tensor.shape  # noqa: E741
    layer, groups = tensor.name.removesuffix(".weight"), I // group_size
    scales: list[Tensor] = []

    def words() -> Iterator[Tensor]:
        packed, scale = to_groups(*matrices.codes(tensor.name), group_size)
        scales.append(scale.to(tensor.dtype))
        yield packed

    def biases() -> Iterator[Tensor]:
        yield -scales[0]

    return [
        Stored(tensor.name, torch.uint32, (O, I // CODES_PER_WORD), words()),
        Stored(f"{layer}.scales", tensor.dtype, (O, groups), scales),  # filled by then: words are written first
        Stored(f"{layer}.biases", tensor.dtype, (O, groups), biases()),
    ]
