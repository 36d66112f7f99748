"""Compute the codes of a checkpoint's quantized matrices, one at a time, as the training forward does."""

from math import prod

import torch
from torch import Tensor

from launcher.checkpoint.source import Source
from model.transformer import ModelConfig, Transformer
from quant.codes import unpack
from quant.config import QuantConfig, is_rotated
from quant.hadamard import rotate, rotate_weight
from quant.linear import LEARNED_SCALE, matching_layers, sharers
from quant.rounding import dequantize, learned_scale, weight_codes, weight_scale


class CodedMatrices:
    """The matrices of a source that are quantized.

    Args:
        source: of the latent weights, and of learned scales; or a packed one, whose codes are taken as they are.
        model: of the source.
        quantization: that it computes with.
    """

    def __init__(self, source: Source, model: ModelConfig, quantization: QuantConfig) -> None:
        self._source, self.config = source, quantization
        with torch.device("meta"):
            layers = matching_layers(Transformer(model), quantization)
        names = {module: name for name, module in layers.items()}
        self._sharers = {
            f"{name}.weight": [names[layer] for layer in sharers(name, layers)] if quantization.fused else [name]
            for name in layers
        }

    def __contains__(self, name: str) -> bool:
        """Return whether the parameter of this name is quantized."""
        return name in self._sharers

    @property
    def names(self) -> tuple[str, ...]:
        """The quantized parameters, in the order of the model."""
        return tuple(self._sharers)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes of a matrix as int8 [O, I], and their fp32 level, [1, 1], [O, 1] or [O, G].

        With a rotation, these are of the rotated matrix.
        """
        if self._source.is_packed:
            packed_RI, level = self._source.packed(name)
            return unpack(packed_RI)[: self._source.shapes[name][0]], level
        config, layer = self.config, name.removesuffix(".weight")
        weight_OI = self._rotated(layer)
        if config.learned:
            (rows,) = self._source.shapes[f"{layer}.{LEARNED_SCALE}"]
            scale = learned_scale(
                self._source.read_finite("weight", f"{layer}.{LEARNED_SCALE}", 0, rows), config.levels
            )
        else:
            shared = self._sharers[name]
            scale = weight_scale([weight_OI] if shared == [layer] else [*map(self._rotated, shared)], config)
        return weight_codes(weight_OI, scale, config).to(torch.int8), scale.level

    def dequantized(self, name: str) -> Tensor:
        """Codes times their level, fp32 [O, I], for inputs that are not rotated."""
        weight_OI = dequantize(*self.codes(name))
        return rotate(weight_OI) if is_rotated(name.removesuffix(".weight"), self.config) else weight_OI

    def _rotated(self, layer: str) -> Tensor:
        name = f"{layer}.weight"
        shape = self._source.shapes[name]
        weight_OI = self._source.read_finite("weight", name, 0, prod(shape)).view(shape)
        return rotate_weight(weight_OI) if is_rotated(layer, self.config) else weight_OI
