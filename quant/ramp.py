"""Ramps: quantization strength as a pure function of the steps since the transition."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """How the quantization strength rises from 0 to 1 after a transition."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
    }

    shape: Literal["linear", "tanh"] = "linear"
    """`linear`, or `tanh`: tanh(2.5 t/T), the schedule in the code of arXiv 2502.11895, which jumps from 0.987 to 1."""
    steps: int = 0
    """Steps from strength 0 to strength 1; 0 switches at once."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError({"steps": f"is {self.steps}; 0 (switch at once) or more"})


def strength_at(step: int, ramp: RampConfig) -> float:
    """Strength in [0, 1] of the ``step``-th step after the transition, counted from 0."""
    if step >= ramp.steps:
        return 1.0
    progress = step / ramp.steps
    return progress if ramp.shape == "linear" else math.tanh(2.5 * progress)
