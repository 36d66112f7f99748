"""Measure quantization during training: shares of codes, flips, distances, errors.

A `Probe` is called by every quantized layer at the beginning of a forward pass, where the weight is whole (gathered)
and the input is there. It takes what can be computed in place, small sums on the device, and of the codes only this
rank's own range, so that no rank remembers more than its share. Nothing here waits for the device, and nothing of
the training is touched.

Weights are looked at as the layers quantize them: as the bf16 cast of the latent weight.

Dimensions: O output features, I input features, L quantized layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.linear import QuantLinear
from quant.rounding import (
    LARGEST_CODE,
    LEARNED,
    SMALLEST_SCALE,
    Scale,
    bf16_values,
    by_ones,
    dequantize,
    over_blocks,
    weight_codes,
)

WEIGHT_FIGURES = (
    "zero_share",
    "plus_share",
    "minus_share",
    "scale",
    "threshold_distance",
    "weight_error",
    "dead_row_share",
)
"""What `weight_figures` gives, in its order."""

DISTANCE_EDGES = (*(tenth / 10 for tenth in range(11)), 1.1)
"""Bins of the distance of a latent weight to its nearest threshold, in scales; the last has all that is farther."""

MOST_FLIPS = 8
"""Flips of a weight are binned as 0, 1, ... and this many or more."""

SUMS = ("input_error", "input", "clipped", "num_inputs", "flipped", "moved", "num_weights")
"""What `Probe` sums for each layer besides, in its order; all of it adds up over ranks."""


def code_range(config: QuantConfig) -> tuple[int, int]:
    """The smallest and the largest code that there are."""
    largest = LARGEST_CODE[config.levels]
    return LEARNED[config.levels].codes if config.learned else (-largest, largest)


def weight_figures(weight_OI: Tensor, codes_OI: Tensor, scale: Scale, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Describe one matrix and its codes.

    Args:
        weight_OI: the latent weight as it is rounded, gathered.
        codes_OI: its codes.
        scale: of its blocks.
        config: what made the codes.

    Returns:
        `WEIGHT_FIGURES` as an fp32 vector, and how many weights lie in each bin of `DISTANCE_EDGES` (fp32).

        Shares are of the matrix's weights: with code 0, with the largest and with the smallest code. The scale is what
        codes are multiplied by, the mean over rows and groups. The error is the L2 norm of what rounding changes,
        relative to the weight's own. A dead row has no code but 0, or a learned scale at its floor: its output is
        constant, or next to nothing.
    """
    weight_OI = bf16_values(weight_OI)
    smallest, largest = code_range(config)
    is_zero_OI = codes_OI == 0
    distance_OI = threshold_distance(weight_OI, codes_OI, scale, config)
    error = (dequantize(codes_OI, scale.level) - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30)
    figures = (
        is_zero_OI.float().mean(),
        (codes_OI == largest).float().mean(),
        (codes_OI == smallest).float().mean(),
        scale.level.float().mean(),
        distance_OI.mean(),
        error,
        (is_zero_OI.all(dim=1) | (config.learned and scale.level[:, 0] <= SMALLEST_SCALE)).float().mean(),
    )
    farthest = DISTANCE_EDGES[-1]
    histogram = torch.histc(distance_OI.clamp(max=farthest), bins=len(DISTANCE_EDGES) - 1, min=0, max=farthest)
    return torch.stack(figures), histogram


def threshold_distance(weight_OI: Tensor, codes_OI: Tensor, scale: Scale, config: QuantConfig) -> Tensor:
    """Distance of each weight from where its code would change; fp32, in the shape of the weight.

    In units of what weights are divided by before they are rounded: the level, and for `twn` twice its threshold.
    Thresholds lie half-way between neighboring codes. The largest and the smallest code have one on one side only, so
    that the distance of a weight beyond them has no bound.
    """
    half_step = 0.5 if by_ones(config) else 1.0
    smallest, largest = code_range(config)
    beyond_OI = weight_OI / over_blocks(scale.divisor, weight_OI.shape) - codes_OI
    towards_OI = torch.where(codes_OI == largest, -beyond_OI, beyond_OI.abs())
    towards_OI = torch.where(codes_OI == smallest, beyond_OI, towards_OI)
    return (half_step - towards_OI).clamp(min=0)  # below 0 only by rounding


def input_sums(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of the inputs' rounding, the inputs' squares, and how many were clipped; 0-dim, to be summed.

    An input is clipped where it lies beyond the outermost code, so that rounding moved it by more than half a step:
    never with a scale of absmax / 127, but with one of absmax / 128 where the largest of a token is positive.
    """
    x = x.float()
    error = codes * scale - x
    # 1 % of a step for the rounding of scale and product.
    return error.square().sum(), x.square().sum(), (error.abs() > 0.51 * scale).sum()


@dataclass
class Measurement:
    """The measurements of one step, on the device."""

    figures: Tensor
    """[L, `WEIGHT_FIGURES`], equal on all ranks."""
    distances: Tensor
    """[`DISTANCE_EDGES` - 1]: weights of all layers in each bin, equal on all ranks."""
    sums: Tensor
    """[L, `SUMS`] in fp64: this rank's part."""
    flip_counts: Tensor
    """[`MOST_FLIPS` + 1] in fp64: weights of this rank's ranges by the number of their flips."""
    has_flips: bool
    """Whether the step before was looked at as well, so that `flipped` says something."""


class Probe:
    """Looks at all quantized layers of a model in a forward pass.

    What it remembers lies on the device: for each weight of this rank's ranges the first code seen and a count of flips
    (2 bytes), and between two steps that are compared the code (1 byte).

    Args:
        layers: the quantized layers.
        ranges: for each of them the first element and the length of this rank's range of the flattened weight. Over
            all ranks they cover each weight once.
    """

    def __init__(self, layers: Iterable[QuantLinear], ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = dict(zip(layers, ranges, strict=True))
        self._first: dict[QuantLinear, Tensor] = {}
        self._before: dict[QuantLinear, Tensor] = {}
        self._now: dict[QuantLinear, Tensor] = {}
        self._taken: dict[QuantLinear, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._num_flips: dict[QuantLinear, Tensor] = {}

    def attach(self, *, measure: bool, compare_next: bool) -> None:
        """Begin a step.

        Args:
            measure: take everything; else only the codes.
            compare_next: whether the step that follows will be looked at too, and its codes compared with this one's.
        """
        self._measure, self._compare_next = measure, compare_next
        self._now, self._taken = {}, {}
        for layer in self._ranges:
            layer.probe = self

    def detach(self) -> Measurement | None:
        """End the step, attached or not; returns what was measured."""
        if not self._now:
            return None
        for layer in self._ranges:
            layer.probe = None
        has_flips = bool(self._before)
        self._before, self._now = self._now if self._compare_next else {}, {}
        if not self._measure:
            return None
        taken = [self._taken[layer] for layer in self._ranges]
        figures, distances, sums, flip_counts = (torch.stack(column) for column in zip(*taken, strict=True))
        return Measurement(figures, distances.sum(0), sums, flip_counts.sum(0), has_flips)

    @torch.no_grad()
    def __call__(self, layer: QuantLinear, x: Tensor) -> None:
        """Look at one layer."""
        config, weight_OI = layer.quant_config, layer.rotated_weight()
        scale = layer.rounding_scale(weight_OI)
        codes_OI = weight_codes(weight_OI, scale, config)
        start, length = self._ranges[layer]
        codes = self._now[layer] = codes_OI.flatten()[start : start + length].to(torch.int8)
        if layer not in self._first:
            self._first[layer] = codes
            self._num_flips[layer] = torch.zeros_like(codes, dtype=torch.uint8)
        if not self._measure:
            return
        flipped: float | Tensor = 0
        if layer in self._before:
            is_flipped = codes != self._before[layer]
            flipped = is_flipped.sum()
            self._num_flips[layer] += is_flipped & (self._num_flips[layer] < 255)
        moved = (codes != self._first[layer]).sum()
        inputs = layer.input_codes(x)
        of_inputs = (*input_sums(layer.rounded_input(x), *inputs), x.numel()) if inputs is not None else (0, 0, 0, 0)
        sums = [
            value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=x.device)
            for value in (*of_inputs, flipped, moved, length)
        ]
        capped = self._num_flips[layer].clamp(max=MOST_FLIPS).float()
        flip_counts = torch.histc(capped, bins=MOST_FLIPS + 1, min=-0.5, max=MOST_FLIPS + 0.5).double()
        figures = weight_figures(weight_OI, codes_OI, scale, config)
        self._taken[layer] = (*figures, torch.stack(sums), flip_counts)
