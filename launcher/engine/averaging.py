"""The exponential moving average of the weights, kept beside them.

After each step that trained, the average moves towards the weights. With tokens t_1 .. t_n so far and a half-life h,
the weights of step i count `2^(-(T_n - T_i) / h) * (1 - 2^(-t_i / h))`, where T_i = t_1 + ... + t_i, and the sum of
these factors is divided out (the bias correction of Adam, arXiv 1412.6980, section 3): so the average of one step is
its weights, and the first weights have no more part in later averages than any others. A half-life in tokens keeps its
meaning when the batch changes (arXiv 2307.13813).

Every element is computed by itself, so the bits do not depend on how weights are sharded.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """This rank's part of the averaged weights.

    Args:
        weights: by name, flat; the live ones, which change in place.
        half_life_tokens: a step counts half as much as one that trained this many tokens later.
        device: where steps are computed; the average lies where the weights do.
    """

    def __init__(self, weights: Mapping[str, Tensor], half_life_tokens: int, device: torch.device) -> None:
        self.tensors = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        """The average, by name; zeros until a step has trained."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        """Tokens of the averaged steps; 0-dim."""
        self._rate = math.log(2) / half_life_tokens

    @torch.no_grad()
    def update_(self, weights: Mapping[str, Tensor], tokens: int, skipped: Tensor) -> None:
        """Take in the weights after a step; nothing here waits for the device.

        Args:
            weights: by name, flat.
            tokens: of the step.
            skipped: 1.0 if the step was skipped, and is not to count, else 0.0; 0-dim, on the device.
        """
        taken = skipped == 0
        self.tokens += tokens * taken
        share = math.expm1(-self._rate * tokens) / torch.expm1(-self._rate * self.tokens.double())
        share = share.where(taken, 0.0).float()
        for name, weight in weights.items():
            share = share.to(weight)
            self.tensors[name].lerp_(weight, share)

    @contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the average and the weights within the block, tensor by tensor, so that no third copy is needed."""
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            live = weight.clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(live)
