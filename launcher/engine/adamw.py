"""AdamW and its parameter groups, the same for every engine."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from launcher.config.optimizer import OptimizerConfig
from launcher.plan.schedule import StepSizes
from quant.linear import LEARNED_SCALE


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


def set_step_sizes(optimizer: torch.optim.Optimizer, sizes: StepSizes) -> None:
    """Give every group of ``optimizer``, made by `parameter_groups`, its learning rate and weight decay of a step.

    Weight decay is a multiple of the group's own learning rate, as torch's AdamW has it.
    """
    for group in optimizer.param_groups:
        group["lr"] = sizes.learning_rate * (sizes.ternary_factor if group["ternary"] else 1.0)
        group["weight_decay"] = group["full_weight_decay"] * sizes.decay_factor


def create_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The Adam state of one parameter, created as zeros if the optimizer has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
