"""Transitions: what happens to the model, the optimizer and the strength between two phases.

Weights always carry over, as the same tensors under the same names. Everything else is a choice of its own, so that
their effects can be told apart.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from launcher.config.optimizer import OptimizerName
from launcher.config.strict import STRICT
from quant.config import CalibrationConfig
from quant.ramp import RampConfig

OptimizerChoice = Literal["keep", "reset", "keep-variance", "rescale"]


@dataclass(frozen=True, kw_only=True)
class LearningRateDrop:
    """A lower learning rate for a while."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    factor: float
    """Multiplies the schedule's learning rate."""
    tokens: int
    """Number of tokens after the switch, rounded up to whole steps."""

    def __post_init__(self) -> None:
        problems = {}
        if not 0 < self.factor < 1:
            problems["factor"] = f"is {self.factor}; must be between 0 and 1"
        if self.tokens < 1:
            problems["tokens"] = f"is {self.tokens}; must be 1 or more"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """Return to the checkpoint at the switch, with a longer ramp, if the loss does not recover."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    after_tokens: int
    """Tokens after the end of the ramp by which the smoothed loss must be back at its level before the switch."""
    ramp_factor: float = 2.0
    """Factor by which each attempt lengthens the ramp; without a ramp, the first one is `after_tokens` long."""
    max_attempts: int = 2
    """Maximum number of rollbacks; after them the run continues as it is."""

    def __post_init__(self) -> None:
        problems = {}
        for name in ("after_tokens", "max_attempts"):
            if getattr(self, name) < 1:
                problems[name] = f"is {getattr(self, name)}; must be 1 or more"
        if self.ramp_factor <= 1:
            problems["ramp_factor"] = f"is {self.ramp_factor}; must be above 1"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """The transition into a phase. Weights always carry over, the live or the averaged ones."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    optimizer: OptimizerChoice = "keep"
    """The optimizer's state: `keep` it, `reset` it (moments and step), `keep-variance` (first moment 0, the rest kept),
    or `rescale` the moments to the gradients after the switch. Muon's momentum is a first moment."""
    optimizer_name: OptimizerName | None = None
    """Optimizer from this phase on; null: as before. Muon takes AdamW's first moments over; AdamW after Muon needs
    `optimizer: reset`."""
    weights: Literal["live", "averaged"] = "live"
    """Begin the phase with the `live` weights, or with the `averaged` ones of the 16-bit phase before (see
    `averaging`)."""
    rescale_factor: float | None = None
    """Factor by which gradients grow at the switch, for `rescale`; null: measured there."""
    schedule: Literal["continue", "restart"] = "continue"
    """`continue` on the run's learning-rate curve, or `restart` it over what remains of the run, warm-up included."""
    rewarm_tokens: int = 0
    """Scale the learning rate linearly from 0 to the schedule's over this many tokens."""
    learning_rate_drop: LearningRateDrop | None = None
    """Lower the learning rate for a while; null: do not."""
    data: Literal["continue", "restart"] = "continue"
    """`continue` with the next unseen sequence, or `restart` the stream from its first."""
    calibration: CalibrationConfig | None = None
    """Fit the codes and levels of a ternary phase to training data; null: round the weights as they are."""
    ramp: RampConfig = field(default_factory=RampConfig)
    """How the quantization strength rises to 1."""
    activation_ramp: RampConfig | None = None
    """A separate ramp for activations; null: `ramp` applies to weights and activations."""
    rollback: RollbackConfig | None = None
    """Go back to the checkpoint at the switch if the loss does not recover; null: do not."""

    def __post_init__(self) -> None:
        problems = {}
        if self.rewarm_tokens < 0:
            problems["rewarm_tokens"] = f"is {self.rewarm_tokens}; must be 0 or more"
        if self.rescale_factor is not None:
            if self.optimizer != "rescale":
                problems["rescale_factor"] = f"has no effect with optimizer: {self.optimizer}; only rescale uses it"
            elif self.rescale_factor <= 0:
                problems["rescale_factor"] = f"is {self.rescale_factor}; must be above 0"
        if self.activation_ramp is not None and self.activation_ramp.rounding != "blend":
            problems["activation_ramp.rounding"] = (
                f"is {self.activation_ramp.rounding}, which is for weights; set ramp.rounding instead"
            )
        if problems:
            raise ValueError(problems)

    @property
    def ramps(self) -> tuple[RampConfig, RampConfig]:
        """The ramps of the weights and of the activations."""
        return self.ramp, self.activation_ramp or self.ramp

    def resolved(self, phase_steps: int) -> "TransitionConfig":
        """The same transition with the lengths of its ramps in steps, into a phase of this many."""
        activation_ramp = self.activation_ramp and self.activation_ramp.resolved(phase_steps)
        return replace(self, ramp=self.ramp.resolved(phase_steps), activation_ramp=activation_ramp)

    @property
    def measures_order(self) -> bool:
        """Return whether blocks take turns in an order that is measured at the switch."""
        return any(ramp.order == "sensitivity" for ramp in self.ramps)

    def stretched(self, attempt: int, after_steps: int) -> "TransitionConfig":
        """The transition after ``attempt`` rollbacks: gentler.

        Args:
            attempt: 0 for none.
            after_steps: `rollback.after_tokens` in steps.
        """
        if self.rollback is None or not attempt:
            return self
        factor = self.rollback.ramp_factor**attempt
        if not any(ramp.steps for ramp in self.ramps):
            begin, factor = replace(self.ramp, steps=after_steps), factor / self.rollback.ramp_factor
            return replace(self, ramp=_longer(begin, factor))
        activation_ramp = self.activation_ramp and _longer(self.activation_ramp, factor)
        return replace(self, ramp=_longer(self.ramp, factor), activation_ramp=activation_ramp)


def _longer(ramp: RampConfig, factor: float) -> RampConfig:
    return replace(ramp, steps=math.ceil(factor * ramp.steps), delay_steps=math.ceil(factor * ramp.delay_steps))
