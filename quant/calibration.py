"""Codes and levels fitted to what a layer is given, rather than to its weights alone.

With the second moments H = sum of x xT of a layer's inputs, rounding a weight W to Q changes its outputs by a squared
error of tr((W - Q) H (W - Q)T), over all inputs together. Two ways to make it small:

- ``error-feedback``: columns are rounded one after the other, and each one's error is made up for by the columns that
  follow (GPTQ, arXiv 2210.17323, algorithm 1; OBQ, 2208.11580). Levels and codes are fitted in turns.
- ``scales``: the weights are rounded as they are, at the best of some thresholds.

In both, the level is that of least squares for the codes. A row (a matrix, if it has one scale) changes only if its
error falls below that of plain rounding.

A layer takes its codes from its latent weight, by the statistic of its recipe, in every step. So what is fitted is
written into the latent weight: `latent_of` makes one that has the level as its statistic and rounds to the codes.

Dimensions: O output features, I input features, R and G blocks of a column and a row (`quant.rounding`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quant.config import CalibrationConfig, QuantConfig
from quant.hadamard import rotate, rotate_weight
from quant.rounding import (
    GAUSSIAN_CLIP,
    LEARNED,
    SMALLEST_SCALE,
    bf16_values,
    dequantize,
    first_alpha,
    in_blocks,
    learned_scale,
    over_blocks,
    rms_scale,
    weight_codes,
    weight_scale,
)

ROUNDS = 5
"""How often codes and level are fitted in turns."""

THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(21))
"""Thresholds that ``scales`` tries, in those of a normal weight's least squared error."""

BLOCK = 128
"""Columns after which their errors are passed on to all others at once, as in GPTQ."""

MARGIN = 0.04
"""Relative distance of latent weights from the thresholds of their codes: more than bf16 moves either."""


class Fit(NamedTuple):
    """A calibrated layer."""

    weight: Tensor
    """Latent, fp32 [O, I], as the layer stores it."""
    alpha: Tensor | None
    """Learned scales, fp32 [O], if the layer has them."""
    errors: Tensor
    """Squared error of the outputs, fp64 [3]: of plain rounding, after the calibration, and of rounding all to 0."""


@torch.no_grad()
def calibrate(
    weight_OI: Tensor,
    moment_II: Tensor,
    config: QuantConfig,
    calibration: CalibrationConfig,
    *,
    rotated: bool = False,
) -> Fit:
    """Fit a layer's codes and levels to its inputs, and write them into its latent weight.

    Args:
        weight_OI: latent, fp32, as the layer stores it.
        moment_II: sum over inputs of x xT, fp64, of the inputs as the layer multiplies them: prepared and rounded.
        config: of the layer; one without `quant.config.calibration_problems`.
        calibration: the method.
        rotated: whether the layer rotates its weight before it rounds it.
    """
    stored_OI = weight_OI.float()
    weight_OI = rotate_weight(stored_OI) if rotated else stored_OI
    exact_OI = (rotate(stored_OI) if rotated else stored_OI).double()
    by_row = config.granularity != "matrix"

    def errors(codes_OI: Tensor, level: Tensor) -> Tensor:
        errors_O = output_errors(exact_OI - dequantize(codes_OI.double(), level), moment_II)
        return errors_O if by_row else errors_O.sum().expand_as(errors_O)

    alpha_O = first_alpha(bf16_values(weight_OI).abs().amax(1), config.levels) if config.learned else None
    codes_OI, level = rounded(weight_OI, alpha_O, config)
    level = level.double()
    plain_O = best_O = errors(codes_OI, level)
    is_new_O, values_OI = torch.zeros_like(best_O, dtype=torch.bool), exact_OI
    for candidate_OI, candidate_level, unrounded_OI in candidates(exact_OI, moment_II, config, calibration):
        found_O = errors(candidate_OI, candidate_level)
        better_O = (found_O < best_O) & has_codes(candidate_OI, config)
        codes_OI = torch.where(better_O[:, None], candidate_OI, codes_OI)
        values_OI = torch.where(better_O[:, None], unrounded_OI, values_OI)
        level = torch.where(better_O[: len(level), None], candidate_level, level)
        best_O, is_new_O = torch.minimum(found_O, best_O), is_new_O | better_O
    latent_OI = latent_of(values_OI, codes_OI.double(), level, config).float()
    fitted_alpha_O = (level[:, 0] / LEARNED[config.levels].unit).float() if config.learned else None
    latent_OI = rotate(latent_OI) if rotated else latent_OI
    # The layer rotates the bf16 values, which brings errors: relative to the row, and codes of one that is far above
    # the level can change. What is kept is judged by the codes that the layer will have.
    rounded_OI = rotate_weight(latent_OI) if rotated else latent_OI
    new_codes_OI, new_level = rounded(rounded_OI, fitted_alpha_O, config)
    new_O = errors(new_codes_OI, new_level)
    is_new_O = is_new_O & (new_O < plain_O)
    if alpha_O is not None and fitted_alpha_O is not None:
        alpha_O = torch.where(is_new_O, fitted_alpha_O, alpha_O)
    after_O = torch.where(is_new_O, new_O, plain_O)
    sums = [each[: len(level)].sum() for each in (plain_O, after_O, errors(torch.zeros_like(codes_OI), level))]
    return Fit(torch.where(is_new_O[:, None], latent_OI, stored_OI), alpha_O, torch.stack(sums))


def rounded(weight_OI: Tensor, alpha_O: Tensor | None, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Codes and level of a weight as a layer makes them."""
    scale = weight_scale((weight_OI,), config) if alpha_O is None else learned_scale(alpha_O, config.levels)
    return weight_codes(weight_OI, scale, config), scale.level


def has_codes(codes_OI: Tensor, config: QuantConfig) -> Tensor:
    """Whether each block of a row, or the matrix, has a code other than 0, [O] or [1]: else it can have no level."""
    return in_blocks(codes_OI, config.granularity, config.group_size).any(-1).any(-1).all(-1)


def output_errors(change_OI: Tensor, moment_II: Tensor) -> Tensor:
    """Squared change of each output, [O], summed over inputs with these second moments, if the weight changes."""
    return ((change_OI @ moment_II) * change_OI).sum(-1).clamp(min=0)


def candidates(
    weight_OI: Tensor, moment_II: Tensor, config: QuantConfig, calibration: CalibrationConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield codes, their levels and what was rounded, [O, I], [R, G], [O, I]; nothing if all inputs are 0."""
    if not moment_II.any():
        return
    blocks = in_blocks(weight_OI, config.granularity, config.group_size)
    normal = (rms_scale(blocks.float()) * GAUSSIAN_CLIP["ternary"]).clamp(min=SMALLEST_SCALE).double()
    if calibration.method == "scales":
        for threshold in THRESHOLDS:
            codes_OI = round_at(weight_OI, over_blocks(threshold * normal, weight_OI.shape))
            yield codes_OI, fit_level(weight_OI, codes_OI, normal, moment_II), weight_OI
        return
    order = moment_II.diagonal().argsort(descending=True)
    factor_II, level = feedback_factor(moment_II[order][:, order], calibration.damping), normal
    for _ in range(ROUNDS):
        level_OI = over_blocks(level, weight_OI.shape).expand_as(weight_OI)
        found = error_feedback(weight_OI[:, order], level_OI[:, order], factor_II)
        codes_OI, values_OI = (each[:, order.argsort()] for each in found)
        level = fit_level(weight_OI, codes_OI, level, moment_II)
        yield codes_OI, level, values_OI


def round_at(weight: Tensor, level: Tensor) -> Tensor:
    """The nearest ternary codes."""
    return (weight / level).round().clamp(-1, 1)


def feedback_factor(moment_II: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped second moments (GPTQ, steps 2 and 3), fp64.

    Args:
        moment_II: not all 0.
        damping: is added to the diagonal, in means of the diagonal. It is raised tenfold until the factor exists.
    """
    eye_II = torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)
    damped = damping * moment_II.diagonal().mean()
    while True:
        factor_II, problem = torch.linalg.cholesky_ex(moment_II + damped * eye_II)
        if not problem:
            inverse_II = torch.cholesky_inverse(factor_II)
            factor_II, problem = torch.linalg.cholesky_ex(inverse_II, upper=True)
        if not problem:
            return factor_II
        damped = damped * 10


def error_feedback(weight_OI: Tensor, level_OI: Tensor, factor_II: Tensor) -> tuple[Tensor, Tensor]:
    """Round columns from first to last, each with the errors of those before it made up for.

    This is GPTQ's algorithm 1: the error of column i, divided by element (i, i) of the factor, times the factor's row i
    is what the later columns change by.

    Args:
        weight_OI: to be rounded.
        level_OI: of each weight.
        factor_II: of `feedback_factor`.

    Returns:
        Codes, and the weights as they were when they were rounded, [O, I].
    """
    rest_IO, level_IO = weight_OI.T.contiguous(), level_OI.T
    codes_IO = torch.empty_like(rest_IO)
    for start in range(0, len(rest_IO), BLOCK):
        end = min(start + BLOCK, len(rest_IO))
        errors_KO = torch.empty_like(rest_IO[start:end])
        for i in range(start, end):
            codes_IO[i] = round_at(rest_IO[i], level_IO[i])
            error_O = errors_KO[i - start] = (rest_IO[i] - codes_IO[i] * level_IO[i]) / factor_II[i, i]
            rest_IO[i + 1 : end].addr_(factor_II[i, i + 1 : end], error_O, alpha=-1)
        rest_IO[end:].addmm_(factor_II[start:end, end:].T, errors_KO, alpha=-1)
    return codes_IO.T, rest_IO.T


def fit_level(weight_OI: Tensor, codes_OI: Tensor, level: Tensor, moment_II: Tensor) -> Tensor:
    """The levels of least squared output error for given codes.

    The groups of a row are fitted one after the other, each with the others as they are; a single one is then exact.

    Args:
        weight_OI: what the codes approximate.
        codes_OI: of it.
        level: to begin with, [R, G]; blocks without a code keep it.
        moment_II: of the inputs.

    Returns:
        [R, G], positive.
    """
    level = level.clone()
    width = weight_OI.shape[-1] // level.shape[-1]
    slope_OI = (weight_OI - dequantize(codes_OI, level)) @ moment_II
    for group in range(level.shape[-1]):
        columns = slice(group * width, (group + 1) * width)
        own_OI = codes_OI[:, columns] @ moment_II[columns]
        sums = torch.stack([slope_OI[:, columns] * codes_OI[:, columns], own_OI[:, columns] * codes_OI[:, columns]])
        slope, curvature = sums.sum(-1) if len(level) > 1 else sums.sum((-2, -1))[:, None]
        change = torch.where(curvature > 0, slope / curvature, 0)
        change = torch.maximum(change, SMALLEST_SCALE - level[:, group])
        level[:, group] += change
        slope_OI -= change[:, None] * own_OI
    return level


def latent_of(weight_OI: Tensor, codes_OI: Tensor, level: Tensor, config: QuantConfig) -> Tensor:
    """A latent weight, near the given one, with these codes and, but for learned scales, this level as its statistic.

    Weights that must be 0 are clamped to their cell. Those that must not keep their distance from the threshold, times
    a factor for each block, which is what gives the statistic: nothing else bounds their magnitudes.

    Args:
        weight_OI: fp64.
        codes_OI: -1, 0 or 1. A block that has no code but 0 has no such weight; it gets an arbitrary one.
        level: [R, G].
        config: whose statistic it is.
    """
    weight, codes = (in_blocks(each, config.granularity, config.group_size) for each in (weight_OI, codes_OI))
    level, is_zero = level[..., None, None], codes == 0
    count, num_codes = weight.shape[-2] * weight.shape[-1], _sum(~is_zero)
    edge = level / 2 if config.weights != "twn" else _twn_edge(weight, is_zero, level)
    inner = weight.clamp(-(1 - MARGIN) * edge, (1 - MARGIN) * edge) * is_zero
    least = (1 + MARGIN) * edge
    excess = (weight * codes - least).clamp(min=0) * ~is_zero
    excess = torch.where(_sum(excess) > 0, excess, (~is_zero).to(excess))
    match config.weights:
        case "absmean":
            factor = (count * level - _sum(inner.abs()) - num_codes * least) / _sum(excess)
        case "gaussian":
            squares = count * (level / GAUSSIAN_CLIP["ternary"]).square()
            short = squares - _sum(inner.square()) - num_codes * least.square()
            half, power = least * _sum(excess), _sum(excess.square())
            factor = ((half.square() + power * short).clamp(min=0).sqrt() - half) / power
        case "twn":
            factor = num_codes * (level - least) / _sum(excess)
        case _:
            factor = torch.ones_like(level)
    return torch.where(is_zero, inner, codes * (least + factor * excess)).reshape(weight_OI.shape)


def _sum(blocks: Tensor) -> Tensor:
    return blocks.sum((-2, -1), keepdim=True)


def _twn_edge(weight: Tensor, is_zero: Tensor, level: Tensor) -> Tensor:
    """The threshold, 0.7 of the mean magnitude, when codes other than 0 have the level as their mean magnitude.

    The others are clamped to the threshold, so that it follows from itself; the iteration contracts by 0.7.
    """
    edge, magnitudes = level / 2, weight.abs()
    for _ in range(50):
        edge = 0.7 * torch.where(is_zero, magnitudes.minimum((1 - MARGIN) * edge), level).mean((-2, -1), keepdim=True)
    return edge
