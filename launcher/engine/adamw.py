"""Parameter groups and their rates, the same for every engine; AdamW."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from launcher.config.optimizer import OptimizerConfig
from launcher.plan.schedule import StepSizes
from model.size import is_matrix
from quant.linear import LEARNED_SCALE


def is_decayed(name: str, num_dimensions: int, config: OptimizerConfig) -> bool:
    """Return whether weight decay applies to a parameter: to matrices, never to norms."""
    if num_dimensions < 2:
        return False
    return config.decay_embeddings or not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def parameter_groups(
    parameters: Iterable[tuple[str, int, Any]],
    config: OptimizerConfig,
    ternary: Collection[str] = (),
    *,
    with_muon: bool = False,
) -> list[dict[str, Any]]:
    """Group ``(name, number of dimensions, parameter)`` into decayed parameters, learned scales and all others.

    The parameters named by ``ternary``, which have a learning rate of their own, form more such groups, and so do the
    matrices that Muon updates in any phase of a run ``with_muon``. Empty groups are left out. The number of dimensions
    is passed separately because sharded parameters may be flat.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for own in (False, True):
        # ZeRO keeps one step count for a group, and learned scales begin anew at a switch.
        for kind, decay in (
            ("matrix", config.weight_decay),
            ("decayed", config.weight_decay),
            ("other", 0.0),
            ("scale", 0.0),
        ):
            groups[kind, own] = {
                "params": [],
                "weight_decay": decay,
                "full_weight_decay": decay,
                "ternary": own,
                "matrices": kind == "matrix",
                "rate_factor": 1.0,
            }
    for name, num_dimensions, parameter in parameters:
        kind = "scale" if name.endswith(f".{LEARNED_SCALE}") else "other"
        if with_muon and is_matrix(name, num_dimensions):
            kind = "matrix"
        elif is_decayed(name, num_dimensions, config):
            kind = "decayed"
        groups[kind, name in ternary]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """Build AdamW over ``groups``; every step sets its own learning rate with `set_step_sizes`."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def set_step_sizes(optimizer: torch.optim.Optimizer, sizes: StepSizes) -> None:
    """Set the learning rate and weight decay of every group that `parameter_groups` made.

    Weight decay is proportional to the group's own learning rate, as in torch's AdamW.
    """
    for group in optimizer.param_groups:
        group["lr"] = sizes.learning_rate * group["rate_factor"] * (sizes.ternary_factor if group["ternary"] else 1.0)
        group["weight_decay"] = group["full_weight_decay"] * sizes.decay_factor


def create_state(optimizer: torch.optim.Optimizer, parameter: Tensor, *, variance: bool = True) -> dict[str, Tensor]:
    """Return the optimizer's state of one parameter; what is missing, as before the first step, is created as zeros.

    Args:
        optimizer: AdamW, or `launcher.engine.muon.MuonAdamW`.
        parameter: as the optimizer has it.
        variance: whether there is a second moment; Muon has none.
    """
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
    if variance and "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
