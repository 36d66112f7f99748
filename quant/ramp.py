"""Ramps: the quantization strength as a function of the steps since the transition.

With t the steps since the ramp began and T its length, p = t/T, a strength is

    linear       p
    cosine       (1 - cos pi p) / 2
    sigmoid      1 / (1 + exp(-k (p - 1/2))), shifted and scaled so that it goes from 0 to 1
    exponential  1 - (1 - p)^k
    tanh         tanh(2.5 p), which jumps from 0.987 to 1 at the end
    staircase    floor(n p) / n

`tanh` is the schedule in the code of arXiv 2502.11895. `linear`, `sigmoid` (k 15 to 100) and `exponential` (k 4 to 10)
are those that Hugging Face compared when it turned Llama 3 into 1.58 bits, where linear over 1000 steps did best
(https://huggingface.co/blog/1_58_llm_extreme_quantization).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from quant.strict import STRICT

Rounding = Literal["blend", "softmax"]

SHARPNESS = {"sigmoid": 15.0, "exponential": 4.0}
"""k of the shapes that have one, where none is given: the gentlest that Hugging Face tried."""


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """A ramp: the quantization strength as it rises from 0 to 1 after a transition."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shape: Literal["linear", "cosine", "sigmoid", "exponential", "tanh", "staircase"] = "linear"
    """`linear`, `cosine`, `sigmoid`, `exponential` (fast, then slow), `staircase`, or `tanh`: tanh(2.5 t/T), the
    schedule in the code of arXiv 2502.11895, which jumps from 0.987 to 1."""
    steps: int = 0
    """Steps from strength 0 to strength 1; 0 switches at once."""
    fraction: float | None = None
    """Their number as a share of the phase; give one of the two."""
    delay_steps: int = 0
    """Steps at strength 0 before that."""
    order: Literal["all", "front-to-back", "back-to-front", "sensitivity"] = "all"
    """`all` blocks of the model at once, or one after the other, each with an equal share of the steps. `sensitivity`:
    first the block whose rounding alone raises the loss least, measured at the switch."""
    rounding: Rounding = "blend"
    """How weights are rounded in part: `blend` the 16-bit weights with the rounded ones by the strength, or `softmax`:
    codes are expected values under a softmax that hardens (Hestia, arXiv 2601.20745)."""
    sharpness: float | None = None
    """k of `sigmoid` (null: 15) and `exponential` (null: 4); the higher, the steeper."""
    stairs: int | None = None
    """Number of equal jumps of `staircase`, the last one at the end."""

    def __post_init__(self) -> None:
        problems = {}
        if self.steps < 0:
            problems["steps"] = f"is {self.steps}; 0 (switch at once) or more"
        if self.fraction is not None and not 0 < self.fraction <= 1:
            problems["fraction"] = f"is {self.fraction}; must be above 0 and at most 1"
        elif self.fraction is not None and self.steps:
            problems["fraction"] = f"is given, and so is steps: {self.steps}; give one of the two"
        if self.delay_steps < 0:
            problems["delay_steps"] = f"is {self.delay_steps}; must be 0 or more"
        if self.sharpness is not None:
            if self.shape not in SHARPNESS:
                problems["sharpness"] = f"has no effect for {self.shape}; only {' and '.join(SHARPNESS)} have one"
            elif self.sharpness <= 0 or (self.shape == "exponential" and self.sharpness < 1):
                least = "at least 1" if self.shape == "exponential" else "above 0"
                problems["sharpness"] = f"is {self.sharpness}; must be {least}"
        if self.shape == "staircase" and (self.stairs is None or self.stairs < 1):
            problems["stairs"] = f"is {self.stairs}; a staircase needs 1 or more"
        if self.shape != "staircase" and self.stairs is not None:
            problems["stairs"] = f"has no effect for {self.shape}; only staircase has stairs"
        for key, simplest in (("order", "all"), ("rounding", "blend")):
            if getattr(self, key) != simplest and not (self.steps or self.fraction):
                problems[key] = f"is {getattr(self, key)}, which needs steps above 0 or a fraction"
        if problems:
            raise ValueError(problems)

    def resolved(self, phase_steps: int) -> "RampConfig":
        """The same ramp with its length in steps, in a phase of this many."""
        if self.fraction is None:
            return self
        return replace(self, steps=max(1, round(self.fraction * phase_steps)), fraction=None)

    @property
    def end_steps(self) -> int:
        """Steps after the transition from which on the strength is 1 everywhere."""
        return self.delay_steps + self.steps


def strength_at(
    step: int, ramp: RampConfig, depth: int = 0, num_layers: int = 1, measured: Sequence[int] | None = None
) -> float:
    """Strength in [0, 1] of one block of the model in one step.

    Args:
        step: counted from 0 at the transition.
        ramp: how it rises.
        depth: of the block, counted from 0 at the front.
        num_layers: blocks of the model. In an `order`, the k-th of L blocks has the k-th L-th of the steps as its ramp.
        measured: depths of the blocks in the order ``sensitivity``.
    """
    if step < ramp.delay_steps:
        return 0.0
    elapsed = step - ramp.delay_steps
    if ramp.order != "all":
        turn = num_layers - 1 - depth if ramp.order == "back-to-front" else depth
        if ramp.order == "sensitivity" and measured is not None:
            turn = measured.index(depth)
        elapsed = elapsed * num_layers - turn * ramp.steps  # in L-ths of a step, so that it stays whole
    if elapsed >= ramp.steps:
        return 1.0
    return _rise(max(0, elapsed), ramp)


def _rise(elapsed: int, ramp: RampConfig) -> float:
    """Strength after ``elapsed`` of ``ramp.steps``, without the end, where every shape is 1."""
    progress = elapsed / ramp.steps
    sharpness = ramp.sharpness or SHARPNESS.get(ramp.shape, 1.0)
    match ramp.shape:
        case "linear":
            return progress
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * progress))
        case "sigmoid":  # 1 / (1 + exp(-x)) is (1 + tanh(x/2)) / 2, and so reaches 0 and 1 exactly
            return 0.5 * (1 + math.tanh(sharpness * (progress - 0.5) / 2) / math.tanh(sharpness / 4))
        case "exponential":
            return 1 - (1 - progress) ** sharpness
        case "tanh":
            return math.tanh(2.5 * progress)
        case "staircase":
            stairs = ramp.stairs or 1
            return elapsed * stairs // ramp.steps / stairs
