"""What happens at the boundary between two phases: to the model, the optimizer and the strength.

Weights always carry over, as the same tensors under the same names. Everything else is a choice of its own, so that
their effects can be told apart.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from launcher.engine import Engine
from quant.ramp import RampConfig

OptimizerChoice = Literal["keep", "reset", "keep-variance"]


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """What happens where a phase begins. Weights always carry over."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
    }

    optimizer: OptimizerChoice = "keep"
    """Adam's state: `keep` it, `reset` it (moments and step), or `keep-variance` (first moment 0, the rest kept)."""
    schedule: Literal["continue", "restart"] = "continue"
    """`continue` on the run's learning-rate curve, or `restart` it over what remains of the run, warm-up included."""
    rewarm_tokens: int = 0
    """Scale the learning rate linearly from 0 to the schedule's over this many tokens."""
    data: Literal["continue", "restart"] = "continue"
    """`continue` with the next unseen sequence, or `restart` the stream from its first."""
    ramp: RampConfig = field(default_factory=RampConfig)
    """How the quantization strength rises to 1."""

    def __post_init__(self) -> None:
        if self.rewarm_tokens < 0:
            raise ValueError({"rewarm_tokens": f"is {self.rewarm_tokens}; must be 0 or more"})


@torch.no_grad()
def carry_optimizer_(engine: Engine, choice: OptimizerChoice) -> None:
    """Carry Adam's state over a transition, in place.

    ``reset`` starts as a new optimizer does: moments and step 0. ``keep-variance`` clears only the first moment: the
    step stays, because it belongs to the second moment's bias correction, so that the first updates are small and grow
    as the first moment fills, over about 1 / (1 - beta1) steps.
    """
    if choice == "keep":
        return
    for shard in engine.shards():
        shard.tensors["exp_avg"].zero_()
        if choice == "reset":
            shard.tensors["exp_avg_sq"].zero_()
            shard.step.zero_()
