"""Soft rounding to ternary codes: the expected code under a softmax over the levels, which hardens on a ramp.

With u the weight in codes, tau the temperature and s the strength of a ramp::

    p(code) = softmax(-(u - code)^2 / tau)     over the codes -1, 0 and +1
    E       = p(+1) - p(-1) = tanh(2 u / tau) p(not 0)
    dE/du   = 2 / tau * variance of the code

    share of E in the weight, the rest is the 16-bit weight:   min(s / 0.2, 1)
    tau                                                       0.353 * min((1 - s) / 0.8, 1)

This is Hestia (arXiv 2601.20745) without the temperatures of its own for each matrix. A first fifth blends the
16-bit weights into soft codes at the first temperature, from there on the temperature falls to 0, where the codes are
the rounded ones. The fifth and the first temperature are those of the authors' code (github.com/hestia2026/Hestia). At
the first temperature E is closest to u in the mean square, for normal weights that are divided by their mean magnitude;
for this project's other scales the closest is between 0.34 and 0.41. As there, the weights' gradient is the derivative
of what the forward pass computes, with the scale taken as a constant; at full strength it is straight through.
"""

import torch
from torch import Tensor

FIRST_TEMPERATURE = 0.353
"""Of the softmax, in squared codes."""

BLENDING = 0.2
"""Share of a ramp in which soft codes replace the 16-bit weights, before they harden."""

COLDEST = 1e-6
"""Floor of the temperature: at full strength codes are rounded."""


def soft_share(strength: Tensor) -> Tensor:
    """Share of the soft codes in the weight; 0-dim like the strength."""
    return (strength / BLENDING).clamp(max=1.0)


def temperature(strength: Tensor) -> Tensor:
    """Temperature of the softmax; 0-dim like the strength."""
    return FIRST_TEMPERATURE * ((1 - strength) / (1 - BLENDING)).clamp(max=1.0)


def soft_codes(in_codes: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The expected code of each weight, and its derivative by the weight.

    Args:
        in_codes: weights divided by what they are divided by before they are rounded.
        temperature: 0-dim.

    Returns:
        Both of the shape and dtype of ``in_codes``.
    """
    tau = temperature.to(in_codes.dtype).clamp(min=COLDEST)
    magnitude = in_codes.abs()
    odds = (2 * magnitude - 1) / tau + torch.log1p(torch.exp(-4 * magnitude / tau))  # of a code other than 0, their log
    other, zero = torch.sigmoid(odds), torch.sigmoid(-odds)
    balance = torch.tanh(2 * in_codes / tau)
    variance = other * (zero + other * (1 - balance.square()))  # without a difference of numbers close to each other
    return balance * other, 2 / tau * variance
