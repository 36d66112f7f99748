"""Rotary positions (RoFormer, arXiv 2104.09864), and how their frequencies are scaled for longer sequences.

The frequency of pair i of a head is theta^(-2i / E), in radians per token. Three methods scale them, as Hugging Face
Transformers computes them, bit for bit in float32:

- `linear` (Chen et al., arXiv 2306.15595) divides all frequencies by the factor.
- `llama3` (Llama 3.1, arXiv 2407.21783) divides those whose wavelengths are longer than the original context over
  `low_freq_factor`, leaves those shorter than the original context over `high_freq_factor`, and blends in between.
- `yarn` (Peng et al., arXiv 2309.00071) divides those that turn fewer than `beta_slow` times in the original context,
  leaves those that turn more than `beta_fast` times, and blends in between, by dimension. It also multiplies cosines
  and sines by an attention factor.

Dimensions in names: T tokens, E width of a head, H heads, B sequences.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScalingConfig


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per token of each pair, float32, `[E / 2]`; scaled if the model says so."""
    exponents = torch.arange(0, config.head_width, 2, device=device).float() / config.head_width
    periods = config.rope_theta**exponents  # tokens per radian
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / periods
    if scaling.method == "linear":
        return 1.0 / periods / scaling.factor
    if scaling.method == "llama3":
        return _llama3(1.0 / periods, scaling)
    return _yarn(periods, scaling, config.rope_theta)


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    context, factor = scaling.original_context, scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    blended = (1 - share) * scaled / factor + share * scaled
    is_between = ~(wavelengths < context / high) * ~(wavelengths > context / low)
    return torch.where(is_between, blended, scaled)


def _yarn(periods: Tensor, scaling: RopeScalingConfig, theta: float) -> Tensor:
    num_pairs = len(periods)

    def pair_that_turns(times: float) -> float:
        """The pair, as a real number, that turns this many times in the original context."""
        return (2 * num_pairs * math.log(scaling.original_context / (times * 2 * math.pi))) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    last += 0.001 if first == last else 0  # against a division by zero, as in Transformers
    places = torch.arange(num_pairs, dtype=torch.float32, device=periods.device) - first
    # By a tensor: a GPU multiplies by the reciprocal of a number. And made there: it would wait for a copy.
    ramp = (places / torch.full((), last - first, dtype=torch.float32, device=periods.device)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def rotary_tables(config: ModelConfig, num_tokens: int, device: torch.device, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions from `first` on, float32, `[T, E]` each.

    Both halves of the last dimension hold the same angles. YaRN's attention factor is a factor of both tables, so it
    reaches queries and keys, and the scores as its square.
    """
    positions = torch.arange(first, first + num_tokens, device=device).float()
    angles = torch.outer(positions, rotary_frequencies(config, device))
    angles_TE = torch.cat((angles, angles), dim=-1)
    cos_TE, sin_TE = angles_TE.cos(), angles_TE.sin()
    if config.rope_scaling is None:
        return cos_TE, sin_TE
    return cos_TE * config.rope_scaling.attention_scale, sin_TE * config.rope_scaling.attention_scale


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2), Hugging Face's convention, by its position's angle; keeps the input's dtype.

    The tables are `[T, E]`, or `[B, 1, T, E]` where rows differ in their positions.
    """
    first, second = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE).to(x_BHTE.dtype)
