"""AdamW and its parameter groups, the same for every engine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.linear import LEARNED_SCALE


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }

    learning_rate: float
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms are not decayed."""
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
        if not all(0 <= beta < 1 for beta in self.betas):
            problems["betas"] = f"is {list(self.betas)}; both must lie in [0, 1), such as [0.9, 0.95]"
        if problems:
            raise ValueError(problems)


def is_decayed(name: str, num_dimensions: int, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to the parameter of this name: to matrices, never to norms."""
    if num_dimensions < 2:
        return False
    return config.decay_embeddings or not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def parameter_groups(parameters: Iterable[tuple[str, int, Any]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split ``(name, number of dimensions, parameter)`` into the decayed, the others and learned scales.

    Empty groups are left out. The number of dimensions is given apart because sharded parameters may be flat.
    """
    groups: tuple[dict[str, Any], ...] = (
        {"params": [], "weight_decay": config.weight_decay},
        {"params": [], "weight_decay": 0.0},
        # ZeRO keeps one step count for a group, and learned scales begin anew at a switch.
        {"params": [], "weight_decay": 0.0},
    )
    for name, num_dimensions, parameter in parameters:
        index = 0 if is_decayed(name, num_dimensions, config) else 2 if name.endswith(f".{LEARNED_SCALE}") else 1
        groups[index]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over ``groups``; the learning rate is set at every step by whoever steps it."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of ``optimizer`` this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def create_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The Adam state of one parameter, created as zeros if the optimizer has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
