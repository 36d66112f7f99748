"""Pure quantizers: tensor in, integer codes and scale out, and the gradients that training gives to rounding.

A code times its scale approximates the value. All statistics and the rounding are computed in fp32. Weights are
rounded from their bf16 cast, whatever their own precision, so that every engine, kernel and export sees the same codes:
rounding the fp32 master weights instead changes 0.04 to 0.2 % of the codes, statistics in bf16 another 0.2 %.

Statistics are over blocks of a weight matrix, which `in_blocks` makes of it: all of it, its rows, or groups of
neighbors in a row. A scale has the shape [blocks of a column, blocks of a row]: [1, 1], [O, 1] or [O, I / group].

Dimensions: O output features, I input features, R blocks of a column, G blocks of a row, N rows of a block, K elements
of a block's row.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.config import Activations, Granularity, Levels, QuantConfig, WeightScale
from quant.size import NUM_MAGNITUDES

DEFAULT = QuantConfig()
"""The default quantization of a ternary phase."""

SMALLEST_SCALE = 1e-5
"""Floor of every scale, so that an all-zero tensor quantizes to zeros (BitNet b1.58 uses the same value)."""

PIECE = 512
"""Elements of a sum in fp32."""

LARGEST_CODE: dict[Levels, int] = {"binary": 1, "ternary": 1, "int2": 3, "int3": 7, "int4": 15}
"""Codes run from minus this to this: by ones for ternary, by twos (the odd numbers) for the others."""

GAUSSIAN_CLIP: dict[Levels, float] = {
    "binary": 0.7978845587140913,
    "ternary": 1.2240089519030855,
    "int2": 1.4935346200015913,
    "int3": 2.051068354131873,
    "int4": 2.513930578568423,
}
"""Outermost level, in standard deviations, with the least mean squared error on a Gaussian (arXiv 2502.05003, 3.1)."""


class Scale(NamedTuple):
    """The divisor of weights before rounding, and the factor of codes after it; fp32, [R, G]."""

    level: Tensor
    threshold: Tensor | None = None
    """Half of what weights are divided by, where that is not the level: see `twn_scale`."""

    @property
    def divisor(self) -> Tensor:
        """What weights are divided by before rounding."""
        return self.level if self.threshold is None else 2 * self.threshold


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` computes products of ``x`` in; None where it is off, or leaves ``x`` alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In it, what is computed of ``x`` keeps its dtypes: products of codes are exact only in their own."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def bf16_values(x: Tensor) -> Tensor:
    """The bf16 cast of ``x``, as fp32.

    Compiled, fp32 is rounded by its bits: Inductor would leave out a cast to bf16 and back, which is no rounding to it.
    """
    if not torch.compiler.is_compiling() or x.dtype != torch.float32:
        return x.to(torch.bfloat16).float()
    bits = x.view(torch.int32)
    half = 0x7FFF + ((bits >> 16) & 1)  # half a bf16 step, and a tie to the even one
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # `isnan` takes several times as long, element by element
    return torch.where(is_nan, bits, (bits + half) & -0x10000).view(torch.float32)


def _to_nearest(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` of fp32, rounded to nearest.

    On GPUs a compiled reciprocal or root is not, and a quotient by a number is a product with its reciprocal. In fp64,
    which is more than twice as long, it is computed as if it were rounded once.
    """
    return function(x) if x.device.type == "cpu" else function(x.double()).float()


def reciprocal(x: Tensor) -> Tensor:
    """``1 / x`` in fp32, rounded to nearest."""
    return _to_nearest(torch.reciprocal, x)


def quotient(x: Tensor, divisor: Tensor | float) -> Tensor:
    """``x / divisor`` in fp32, rounded to nearest."""
    return _to_nearest(lambda x: x / divisor, x)


def in_blocks(weight_OI: Tensor, granularity: Granularity, group_size: int) -> Tensor:
    """View a matrix as [R, G, N, K]: what shares a scale is N rows of K elements.

    Raises:
        ValueError: the groups do not divide the rows.
    """
    O, I = weight_OI.shape  # noqa: E741
    if granularity == "matrix":
        return weight_OI.reshape(1, 1, O, I)
    if granularity == "row":
        return weight_OI.reshape(O, 1, 1, I)
    if I % group_size:
        raise ValueError(f"group_size {group_size} does not divide rows of {I} weights")
    return weight_OI.reshape(O, I // group_size, 1, group_size)


def over_blocks(scale_RG: Tensor, shape: Sequence[int]) -> Tensor:
    """A scale as something that broadcasts with the matrix of that shape: [1, 1], [O, 1] or [O, I]."""
    width = shape[-1]
    return scale_RG if scale_RG.shape[-1] == 1 else scale_RG.repeat_interleave(width // scale_RG.shape[-1], dim=-1)


INFINITY_BITS = 0x7F80
"""Infinity in bf16."""


def row_sums(values: Tensor) -> Tensor:
    """Sums over the last dimension in fp64, to the last bit the same whoever else holds which other rows.

    On CPUs, where fp64 is slow, pieces are summed in fp32, each by one thread, and their sums in fp64. There the order
    hardly matters.
    """
    if values.device.type != "cpu":
        return values.sum(-1, dtype=torch.float64)
    whole = values.shape[-1] // PIECE * PIECE
    pieces = values[..., :whole].unflatten(-1, (-1, PIECE)).sum(-1)
    return pieces.double().sum(-1) + values[..., whole:].sum(-1).double()


def _mean(blocks: Tensor) -> Tensor:
    """Mean over the last two dimensions, row by row, so that it can be had of rows that lie on several ranks.

    It is to the last bit the same for every number of ranks and threads. A plain fp32 mean depends on how many threads
    share it.
    """
    return _mean_of_rows(row_sums(blocks), blocks.shape[-1])


def _mean_of_rows(sums: Tensor, width: int) -> Tensor:
    return (sums.sum(-1) / (sums.shape[-1] * width)).float()


def absmean_scale(blocks: Tensor) -> Tensor:
    """Mean magnitude (BitNet b1.58, arXiv 2402.17764, eq. 3), of [..., N, K]; the other scales likewise."""
    return _mean(blocks.abs())


def absmedian_scale(blocks: Tensor) -> Tensor:
    """Median magnitude, the lower one of two (b1.58 Reloaded, arXiv 2407.09527, section 3)."""
    return blocks.abs().flatten(-2).median(-1).values


def absmax_scale(blocks: Tensor) -> Tensor:
    """Largest magnitude: nothing is clipped."""
    return blocks.abs().amax((-2, -1))


def rms_scale(blocks: Tensor) -> Tensor:
    """Root mean square, which is the standard deviation that QuEST takes its levels from (arXiv 2502.05003, 3.1)."""
    return _to_nearest(torch.sqrt, _mean(blocks.square()))


def twn_scale(blocks: Tensor) -> Scale:
    """Ternary weight networks: codes beyond 0.7 of the mean magnitude, and the level of least squares for these.

    Source: arXiv 1605.04711, eq. 4 (level) and 6 (threshold).
    """
    magnitudes = blocks.abs()
    threshold = 0.7 * _mean(magnitudes)
    beyond = (magnitudes > threshold[..., None, None]).float()
    level = _mean(magnitudes * beyond) / _mean(beyond).clamp(min=1 / blocks.shape[-2:].numel())
    return Scale(level.clamp(min=SMALLEST_SCALE), threshold.clamp(min=SMALLEST_SCALE / 2))


STATISTICS: dict[WeightScale, Callable[[Tensor], Tensor]] = {
    "absmean": absmean_scale,
    "absmedian": absmedian_scale,
    "absmax": absmax_scale,
    "gaussian": rms_scale,
}


def weight_scale(weights: Sequence[Tensor], config: QuantConfig) -> Scale:
    """The scale of a weight matrix, from its values alone.

    Args:
        weights: the matrix, and after it those of the same width that share its scale.
        config: not with learned scales, see `learned_scale`.

    Returns:
        [R, G].
    """
    matrix = bf16_values(weights[0] if len(weights) == 1 else torch.cat(tuple(weights)))
    if config.weights == "absmedian" and config.granularity == "matrix":
        return scale_from_counts(magnitude_counts(matrix), config)
    blocks = in_blocks(matrix, config.granularity, config.group_size)
    if config.weights == "twn":
        return twn_scale(blocks)
    return _scale_from(STATISTICS[config.weights](blocks), config)


def _scale_from(statistic: Tensor, config: QuantConfig) -> Scale:
    outermost = statistic * GAUSSIAN_CLIP[config.levels] if config.weights == "gaussian" else statistic
    return Scale(quotient(outermost, LARGEST_CODE[config.levels]).clamp(min=SMALLEST_SCALE))


SUMMED: dict[WeightScale, Callable[[Tensor], Tensor]] = {"absmean": torch.abs, "gaussian": torch.square}
"""Scales that are a function of one sum over the matrix, and what is summed."""


def scale_sums(weight_OI: Tensor, config: QuantConfig) -> Tensor:
    """Contributions of a matrix's rows to its scale, fp64 [O]; for the scales of `SUMMED`."""
    return row_sums(SUMMED[config.weights](bf16_values(weight_OI)))


def magnitude_counts(weight_OI: Tensor) -> Tensor:
    """Count each magnitude that bf16 has, int32 [`NUM_MAGNITUDES`], in ascending order.

    The bits of a positive float, as an integer, are in its order.
    """
    bits = weight_OI.to(torch.bfloat16).flatten().abs().view(torch.int16).long()
    counts = torch.zeros(NUM_MAGNITUDES, dtype=torch.int32, device=bits.device)
    return counts.scatter_add_(0, bits, torch.ones_like(bits, dtype=torch.int32))


def scale_from_counts(counts: Tensor, config: QuantConfig) -> Scale:
    """`weight_scale` by absmedian, bit for bit, from the `magnitude_counts` of the whole matrix."""
    so_far = counts.cumsum(0)
    median = (so_far <= (so_far[-1] - 1) // 2).sum()
    # NaN comes after infinity; like `torch.median`, none hides among numbers.
    median = torch.where(so_far[-1] > so_far[INFINITY_BITS], NUM_MAGNITUDES - 1, median)
    return _scale_from(median.to(torch.int16).view(torch.bfloat16).float().view(1, 1), config)


def scale_from_sums(sums_O: Tensor, width: int, config: QuantConfig) -> Scale:
    """`weight_scale` of a matrix with rows of ``width`` weights, bit for bit, from the `scale_sums` of all its rows."""
    mean = _mean_of_rows(sums_O[None, None], width)
    return _scale_from(_to_nearest(torch.sqrt, mean) if config.weights == "gaussian" else mean, config)


def weight_in_codes(weight_OI: Tensor, scale: Scale) -> Tensor:
    """A matrix, or whole rows of it, divided by its scale, before it is rounded; fp32 of the weight's shape."""
    return bf16_values(weight_OI) * over_blocks(reciprocal(scale.divisor), weight_OI.shape)


def weight_codes(weight_OI: Tensor, scale: Scale, config: QuantConfig) -> Tensor:
    """Round a matrix, or whole rows of it, to codes; fp32 of the weight's shape.

    Ternary ties go to 0. It multiplies by the reciprocal, as Transformers' BitNet layers do: the quotient may round
    to the other side of a tie. The even numbers of levels have no 0, and a weight of 0 is rounded up.

    Args:
        weight_OI: any dtype; rounded from its bf16 cast.
        scale: of its blocks.
        config: for its levels.
    """
    scaled = weight_in_codes(weight_OI, scale)
    highest = LARGEST_CODE[config.levels]
    lowest, highest = LEARNED[config.levels].codes if config.learned else (-highest, highest)
    return (scaled.round() if by_ones(config) else 2 * (scaled / 2 - 0.5).round() + 1).clamp(lowest, highest)


def by_ones(config: QuantConfig) -> bool:
    """Return whether codes are neighboring integers; the others are odd."""
    return config.levels == "ternary" or (config.learned and config.levels != "int2")


def quantize_weight(weight_OI: Tensor, config: QuantConfig = DEFAULT) -> tuple[Tensor, Tensor]:
    """Codes of a matrix, fp32 [O, I], and their level, fp32, [R, G]; of one that shares its scale with no other."""
    scale = weight_scale((weight_OI,), config)
    return weight_codes(weight_OI, scale, config), scale.level


def dequantize(codes_OI: Tensor, level: Tensor) -> Tensor:
    """Codes times their level, fp32; ``level`` is [1, 1], [O, 1] or [O, I / group]."""
    return codes_OI * over_blocks(level, codes_OI.shape)


# Learned scales


class Learned(NamedTuple):
    """A quantizer whose scale is a parameter alpha of each row; all but ``unit`` is in units of a code."""

    unit: float
    """A code's level, in alpha."""
    codes: tuple[int, int]
    clip: tuple[float, float]
    """Beyond these the weight gets no gradient."""
    slope: tuple[float, float]
    """Derivative of the result by the level, beyond the clip."""
    positive_levels: int
    """As they count in the gradient's scale."""


LEARNED: dict[Levels, Learned] = {
    "ternary": Learned(2 / 3, (-1, 1), (-1.485, 1.485), (-1.5, 1.5), 1),
    "int2": Learned(1 / 4, (-3, 3), (-3.96, 3.96), (-3.0, 3.0), 1),
    "int3": Learned(1.0, (-4, 3), (-4.0, 3.0), (-4.0, 3.0), 3),
    "int4": Learned(1.0, (-8, 7), (-8.0, 7.0), (-8.0, 7.0), 7),
}
"""ParetoQ (arXiv 2502.02631, section 3.2): stretched elastic quantization for ternary and 2 bits, learned step size
(LSQ, arXiv 1902.08153) for 3 and 4. The numbers are those of its authors' code: it clips at 0.99 of alpha, gives alpha
a slope of 1 beyond it although the outermost ternary level is at 2/3 of it, and counts one positive level of 2 bits."""


def learned_scale(alpha_O: Tensor, levels: Levels) -> Scale:
    """The scale of rows with learned alphas, as bf16 has them, so that master copies in fp32 give no other codes.

    Alphas get the gradient of their values. Below the floor they get that of the floor, as in the authors' code, so
    that a row comes back if its alpha has crossed 0.
    """
    unit = LEARNED[levels].unit
    alphas_O = alpha_O.float() * unit
    used_O = (bf16_values(alpha_O.detach()) * unit).clamp(min=SMALLEST_SCALE)
    return Scale((used_O + (alphas_O - alphas_O.detach()))[:, None])


def first_alpha(largest_O: Tensor, levels: Levels) -> Tensor:
    """The initial alpha of a row, from its largest magnitude (ParetoQ's code)."""
    return largest_O if levels in ("ternary", "int2") else largest_O / LEARNED[levels].codes[1]


# Gradients of rounding


def weight_gradients(
    grad_OI: Tensor, weight_OI: Tensor, codes_OI: Tensor, level: Tensor, config: QuantConfig
) -> tuple[Tensor, Tensor | None]:
    """Gradient by the latent weight, given the one by ``codes * level``; and by the level, where scales are learned.

    - identity: the same (straight through, arXiv 1308.3432).
    - clipped: 0 beyond the outermost levels; with learned scales, beyond their clip.
    - trust: 0 where rounding moves the weight by more than half a step (QuEST, arXiv 2502.05003, eq. 5).

    The level's gradient is that of LSQ (arXiv 1902.08153, eq. 3), scaled by 1 / sqrt(weights * positive levels).

    Args:
        grad_OI: any dtype, which the result keeps.
        weight_OI: latent.
        codes_OI: of the weight.
        level: [R, G].
        config: its gradient, levels and scale.

    Returns:
        [O, I], and fp32 [O, 1] or None.
    """
    if config.gradient == "identity" and not config.learned:
        return grad_OI, None
    in_codes = bf16_values(weight_OI) / over_blocks(level, weight_OI.shape)
    quantizer = LEARNED[config.levels] if config.learned else None
    grad_level = None
    if quantizer is not None:
        low, high = in_codes < quantizer.clip[0], in_codes > quantizer.clip[1]
        slope = torch.where(low, quantizer.slope[0], torch.where(high, quantizer.slope[1], codes_OI - in_codes))
        grad_scale = 1 / math.sqrt(weight_OI.numel() * quantizer.positive_levels)
        grad_level = (slope * grad_OI.float()).sum(-1, keepdim=True) * grad_scale
    if config.gradient == "identity":
        return grad_OI, grad_level
    if config.gradient == "trust":
        passes = (in_codes - codes_OI).abs() <= (0.5 if by_ones(config) else 1.0)
    elif quantizer is not None:
        passes = ~(low | high)
    else:
        # A largest weight is its own outermost level, which the division may miss by its last bit.
        passes = in_codes.abs() <= LARGEST_CODE[config.levels] * (1 + 2**-20)
    return grad_OI * passes, grad_level


# Activations


class ActivationGrid(NamedTuple):
    """The largest magnitude of a token becomes ``scale_by`` codes, and codes are clamped to ``codes``."""

    scale_by: float
    codes: tuple[int, int]
    divides: bool = False
    """Whether inputs are divided by the scale, not multiplied by its reciprocal. The largest magnitude is halfway
    between two codes where ``scale_by`` is, and the last bit decides."""


ACTIVATION_GRIDS: dict[Activations, ActivationGrid] = {
    "int8": ActivationGrid(127, (-127, 127)),
    "int8-127.5": ActivationGrid(127.5, (-128, 127), divides=True),
    "int8-128": ActivationGrid(128, (-128, 127)),
    "int4": ActivationGrid(7, (-7, 7)),
}
"""BitNet b1.58 (arXiv 2402.17764, section 2: absmax, symmetric, no zero point); the `compressed-tensors` package 0.20,
which Transformers runs; the `bitlinear` package 2.4; and BitNet a4.8 (arXiv 2411.04965, eq. 4) on a symmetric grid."""


def quantize_activation(x: Tensor, activations: Activations = "int8") -> tuple[Tensor, Tensor]:
    """Quantize activations, symmetric, one scale for each row of the last dimension (a token).

    Returns:
        codes as fp32, of the shape of ``x``, and the fp32 scale with a last dimension of 1.
    """
    grid = ACTIVATION_GRIDS[activations]
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    if grid.divides:
        scale = quotient(largest, grid.scale_by)
        return quotient(x, scale).round().clamp(*grid.codes), scale
    codes = (x * (reciprocal(largest) * grid.scale_by)).round().clamp(*grid.codes)
    return codes, quotient(largest, grid.scale_by)


# Gradients of products

SMALLEST_GRADIENT = 1e-30
"""Floor of the largest magnitude of a row of gradients."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows of gradients to int8, by the largest magnitude of each; what is not finite spoils its whole row.

    Returns:
        codes as int8, of the shape of ``x``, and the fp32 scale with a last dimension of 1.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_GRADIENT)
    codes = (x * (reciprocal(largest) * 127)).round().clamp(-127, 127).to(torch.int8)
    return codes, quotient(largest, 127)
