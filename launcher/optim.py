"""AdamW and its parameter groups, the same for every engine."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from launcher.strict import STRICT
from quant.linear import LEARNED_SCALE


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    learning_rate: float
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms are not decayed."""
    weight_decay_until: float | None = None
    """Share of the run after which weight decay is 0 (BitNet: 0.5); null: never."""
    ternary_learning_rate_factor: float | None = None
    """In ternary phases, the quantized layers' learning rate as a multiple of the others'; null: the same."""
    decay_embeddings: bool = True
    """Whether the embedding (and an untied head) counts among the decayed matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""

    def __post_init__(self) -> None:
        problems = {}
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                problems[name] = f"is {getattr(self, name)}; must be above 0"
        if self.weight_decay < 0:
            problems["weight_decay"] = f"is {self.weight_decay}; must be 0 or more"
        if self.weight_decay_until is not None:
            if not 0 < self.weight_decay_until < 1:
                problems["weight_decay_until"] = f"is {self.weight_decay_until}; must lie between 0 and 1, or be null"
            elif not self.weight_decay:
                problems["weight_decay_until"] = "does nothing, because weight_decay is 0"
        factor = self.ternary_learning_rate_factor
        if factor is not None and factor <= 0:
            problems["ternary_learning_rate_factor"] = f"is {factor}; must be above 0"
        if not all(0 <= beta < 1 for beta in self.betas):
            problems["betas"] = f"is {list(self.betas)}; both must lie in [0, 1), such as [0.9, 0.95]"
        if problems:
            raise ValueError(problems)


def is_decayed(name: str, num_dimensions: int, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to the parameter of this name: to matrices, never to norms."""
    if num_dimensions < 2:
        return False
    return config.decay_embeddings or not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def parameter_groups(
    parameters: Iterable[tuple[str, int, Any]], config: OptimizerConfig, ternary: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split ``(name, number of dimensions, parameter)`` into the decayed, the others and learned scales.

    There is another such group of those that ``ternary`` names, which have a learning rate of their own. Empty groups
    are left out. The number of dimensions is given apart because sharded parameters may be flat.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for own in (False, True):
        # ZeRO keeps one step count for a group, and learned scales begin anew at a switch.
        for kind, decay in (("decayed", config.weight_decay), ("other", 0.0), ("scale", 0.0)):
            groups[kind, own] = {
                "params": [],
                "weight_decay": decay,
                "full_weight_decay": decay,
                "ternary": own,
            }
    for name, num_dimensions, parameter in parameters:
        kind = "scale" if name.endswith(f".{LEARNED_SCALE}") else "other"
        if is_decayed(name, num_dimensions, config):
            kind = "decayed"
        groups[kind, name in ternary]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over ``groups``; the learning rate is set at every step by whoever steps it."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def set_step_sizes(
    optimizer: torch.optim.Optimizer, learning_rate: float, *, ternary_factor: float, decay_factor: float
) -> None:
    """Give every group of ``optimizer``, made by `parameter_groups`, its learning rate and weight decay of a step.

    Weight decay is a multiple of the group's own learning rate, as torch's AdamW has it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (ternary_factor if group["ternary"] else 1.0)
        group["weight_decay"] = group["full_weight_decay"] * decay_factor


def create_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The Adam state of one parameter, created as zeros if the optimizer has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
