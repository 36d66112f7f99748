"""Things that are made once and held: the codes of a weight, and the codes or the blend of an input.

Dimensions: O output features, I input features, J = I / 4 bytes of a row.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from quant.codes import to_held
from quant.config import QuantConfig
from quant.rounding import Scale, learned_scale, weight_codes, weight_scale

Made = TypeVar("Made")


@dataclass(eq=False)
class HeldCodes:
    """Codes of a weight, made once for as long as the weight stays as it is."""

    scale: Scale
    codes: Tensor
    """`quant.codes.to_held` of them: uint8 [O, J], or int8 [O, I]."""


class Unrounded(NamedTuple):
    """A weight whose codes are to be held."""

    weight: Tensor
    """As it is rounded, [O, I]."""
    together: tuple[Tensor, ...]
    """The weights that share its scale, itself included."""
    alpha: Tensor | None
    """Its learned scales, [O], if it has them."""
    config: QuantConfig


def round_weights(weights: Sequence[Unrounded]) -> list[tuple[Scale, Tensor]]:
    """Scale and codes of each weight, as `HeldCodes` has them."""
    rounded = []
    for weight_OI, together, alpha_O, config in weights:
        scale = weight_scale(together, config) if alpha_O is None else learned_scale(alpha_O, config.levels)
        rounded.append((scale, to_held(weight_codes(weight_OI, scale, config), config.levels)))
    return rounded


class SharedInput:
    """What the layers that are given one input make of it, all the same: codes, or a blend.

    The first of them makes it. It is forgotten when the last has taken it, or with the input; a block's own input lives
    until the backward pass. It is made again if the input has been written to, and in a backward pass that computes
    the layers once more: activation checkpointing gives them the same tensor, and what is recorded must be recorded
    again. Compiled, each makes its own, and the compiler sees that they are one. In inference mode, where torch counts
    no writes, each makes its own as well.

    Args:
        num_layers: that are given the input; None if that is not known.
    """

    def __init__(self, num_layers: int | None = None) -> None:
        self._num_layers = num_layers
        self._num_taken = 0
        self._x: weakref.ref[Tensor] | None = None
        self._how: tuple[object, bool, int, int] | None = None
        self._made: Any = None

    def of(self, x: Tensor, make: Callable[[Tensor], Made]) -> Made:
        """``make(x)``, a method of the layer; what it returns must not hold ``x`` itself."""
        if torch.compiler.is_compiling() or x.is_inference():
            return make(x)
        # As `torch.utils.checkpoint` tells backward passes apart; -1 outside of them.
        backward = torch._C._current_graph_task_id()
        how = make.__func__, torch.is_grad_enabled(), x._version, backward  # type: ignore[attr-defined]
        if self._x is None or self._x() is not x or self._how != how:
            self._x, self._how, self._made, self._num_taken = weakref.ref(x, self._forget), how, make(x), 0
        made = cast(Made, self._made)
        self._num_taken += 1
        if self._num_taken == self._num_layers:
            self._x = self._made = None
        return made

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self._x is x:
            self._x = self._made = None
