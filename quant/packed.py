"""Ternary layers for inference: codes of 2 bits, with exactly the outputs of the layers in training.

`freeze_` puts a `PackedLinear` in the place of every `QuantLinear`. It keeps a fourth of a byte for each weight and
multiplies integers by integers, so that its outputs are those of the layer that it replaces, bit for bit.

Dimensions: N rows (tokens), O output features, I input features, R rows of bytes, G groups of a row.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quant.codes import CODES_PER_BYTE, pack, unpack
from quant.config import BITNET, IN_2_BITS, QuantConfig
from quant.held import SharedInput
from quant.integers import CPU_HAS_INT8, SIGN, activation_codes, integer_product
from quant.kernels import avx2
from quant.kernels.avx2 import CPU_HAS_AVX2
from quant.linear import prepared_input, quantized_layers
from quant.product import grouped_product, unrounded_product
from quant.rounding import without_autocast

BLOCK_BYTES = 2**19
"""Packed bytes that are taken apart at once: the codes of a block stay in a core's cache until they are multiplied."""


class PackedLinear(nn.Module):
    """A frozen ternary layer: ``codes @ input * level``, plus a bias where there is one.

    Codes are taken apart while they are multiplied, a block of rows at a time. Two kinds of layers need all of them for
    the time of a call, as int8 or in the input's dtype: those with a scale for each group, and those whose inputs stay
    in 16 bits.

    Args:
        packed_RI: of `quant.codes.pack`; a number of rows that is no multiple of 4 is padded with rows of zeros.
        level: fp32, [1, 1], [O, 1] or [O, G]; it stays in fp32 when the module is cast.
        out_features: O.
        bias: [O], added in the dtype of the input.
        config: how the input is rounded.
        rotated: whether the input is rotated first.
        dead_zone: fp32 [O], what the layer adds for its weights with code 0, see `QuantConfig.dead_zone_bias`.
        shared_input: of the layers that are given the same input and round it in the same way; None for this one alone.
    """

    packed: Tensor
    level: Tensor
    bias: Tensor | None
    dead_zone: Tensor | None

    def __init__(
        self,
        packed_RI: Tensor,
        level: Tensor,
        out_features: int,
        *,
        bias: Tensor | None = None,
        config: QuantConfig = BITNET,
        rotated: bool = False,
        dead_zone: Tensor | None = None,
        shared_input: SharedInput | None = None,
    ) -> None:
        super().__init__()
        self.shared_input = shared_input or SharedInput()
        self.in_features, self.out_features = packed_RI.shape[1], out_features
        self.quant_config, self.rotated = config, rotated
        self.register_buffer("packed", packed_RI ^ SIGN)
        self.register_buffer("level", level)
        self.register_buffer("bias", bias)
        self.register_buffer("dead_zone", dead_zone)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``x`` is [..., I], the result [..., O], both in the same dtype, under autocast too; without gradient."""
        with without_autocast(x):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        level = self.level
        if self.quant_config.activations == "none":
            y = unrounded_product(self._prepared(x), self.codes(), level)
        else:
            codes, scale = self.shared_input.of(x, self._input_codes)
            codes_NI, scale_N1 = codes.reshape(-1, self.in_features), scale.reshape(-1, 1)
            if level.shape[1] > 1:
                product = grouped_product(codes_NI, self.codes(), level) * scale_N1
            else:
                product = packed_product(codes_NI, self.packed)[:, : self.out_features] * (scale_N1 * level[:, 0])
            y = product.to(x.dtype).view(*x.shape[:-1], self.out_features)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if self.dead_zone is None else y + self.dead_zone.to(y.dtype)

    def _prepared(self, x: Tensor) -> Tensor:
        return prepared_input(x, self.quant_config, rotated=self.rotated)

    def _input_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return activation_codes(self._prepared(x), self.quant_config.activations)

    def codes(self) -> Tensor:
        """All codes, int8 [O, I]."""
        return unpack(self.packed ^ SIGN)[: self.out_features]

    def extra_repr(self) -> str:
        """The layer's shape, for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the module, but leave the scales in fp32."""
        exact = {name: getattr(self, name) for name in ("level", "dead_zone")}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            setattr(self, name, None if tensor is None else tensor.to(self.packed.device))
        return self


def packed_product(codes_NI: Tensor, packed_RI: Tensor) -> Tensor:
    """`integer_product` with packed codes, fp32 [N, 4 * R].

    Args:
        codes_NI: int8.
        packed_RI: of `quant.codes.pack`, with `SIGN` flipped.
    """
    by_avx2 = packed_RI.device.type == "cpu" and CPU_HAS_AVX2
    if by_avx2 and len(codes_NI) <= avx2.FEW_ROWS:  # with VNNI, others are faster by its products
        return torch.ops.tritrain.product_in_bits(codes_NI, packed_RI)
    product_of = torch.ops.tritrain.product_in_bits if by_avx2 and not CPU_HAS_INT8 else _under_masks
    blocks = packed_RI.split(max(1, BLOCK_BYTES // packed_RI.shape[1]))
    products = [product_of(codes_NI, block_RI).unflatten(1, (CODES_PER_BYTE, -1)) for block_RI in blocks]
    return (products[0] if len(products) == 1 else torch.cat(products, 2)).flatten(1)


def _under_masks(codes_NI: Tensor, packed_RI: Tensor) -> Tensor:
    """As fp32 [N, 4 * R].

    Under a mask, the two bits of a row in a byte are (code + 1) * 4**b, an int8, so one operation takes all four rows
    apart. In the highest bits the sign is flipped, so that they are (code - 1) * 4**3. The powers of two and the sum of
    the inputs are taken off the result. All of this is exact; in fp32, on machines without products of integers, up to
    65,536 input features.
    """
    masks_411, factors_41, signs_41 = _of_rows(packed_RI.device)
    bits_4RI = torch.bitwise_and(packed_RI, masks_411).view(torch.int8)
    product_N4R = integer_product(codes_NI, bits_4RI.flatten(0, 1)).unflatten(1, (CODES_PER_BYTE, -1))
    sum_N11 = codes_NI.sum(1, dtype=torch.int32).float()[:, None, None]
    return (product_N4R * factors_41).addcmul_(sum_N11, signs_41).flatten(1)


_OPERATORS = torch.library.Library("tritrain", "FRAGMENT")
_OPERATORS.define("product_in_bits(Tensor codes_NI, Tensor packed_RI) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_OPERATORS, "product_in_bits", "CPU")
def _product_in_bits(codes_NI: Tensor, packed_RI: Tensor) -> Tensor:
    product_NO = avx2.product_in_bits(codes_NI, packed_RI)
    return _under_masks(codes_NI, packed_RI) if product_NO is None else product_NO


@torch.library.register_fake("tritrain::product_in_bits", lib=_OPERATORS)
def _(codes_NI: Tensor, packed_RI: Tensor) -> Tensor:
    return codes_NI.new_empty(len(codes_NI), CODES_PER_BYTE * len(packed_RI), dtype=torch.float32)


@cache
def _of_rows(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the four rows in a byte: masks, factors of the products with what is under them, and signs of the sum."""
    masks = torch.tensor([3 << 2 * row for row in range(CODES_PER_BYTE)], dtype=torch.uint8, device=device)
    factors = torch.tensor([4.0**-row for row in range(CODES_PER_BYTE)], dtype=torch.float32, device=device)
    signs = torch.tensor([-1.0, -1.0, -1.0, 1.0], dtype=torch.float32, device=device)
    return masks[:, None, None], factors[:, None], signs[:, None]


@torch.no_grad()
def freeze_(model: nn.Module) -> list[str]:
    """Replace every `QuantLinear` inside of ``model`` by a `PackedLinear` that computes the same, bit for bit.

    Args:
        model: in the dtype in which it shall compute; may be a part of one. Its latent weights are let go.

    Returns:
        The dotted names of the layers that were replaced.

    Raises:
        ValueError: no layer is quantized; one has more levels than 2 bits hold; or one is at a strength below 1.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer, so there is nothing to freeze")
    for name, layer in layers.items():
        if layer.quant_config.levels not in IN_2_BITS:
            raise ValueError(f"{name} has {layer.quant_config.levels} weights; only ternary and binary ones are packed")
        if layer.mode != "codes":
            strengths = f"{layer.weight_strength.item():.3g} and {layer.activation_strength.item():.3g}"
            raise ValueError(f"{name} is at strengths {strengths} (weights, activations); both must be 1")
    for name, layer in layers.items():
        codes_OI, level = layer.weight_codes()
        padding = -len(codes_OI) % CODES_PER_BYTE
        packed = PackedLinear(
            pack(torch.cat([codes_OI, codes_OI.new_zeros(padding, layer.in_features)]) if padding else codes_OI),
            level.detach().float().clone(),
            layer.out_features,
            bias=None if layer.bias is None else layer.bias.detach(),
            config=layer.quant_config,
            rotated=layer.rotated,
            dead_zone=layer.dead_zone() if layer.quant_config.dead_zone_bias else None,
            shared_input=layer.shared_input,
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, packed)
    for layer in layers.values():
        layer.sharers = ()  # a cycle, which would keep the latent weights
    return list(layers)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
