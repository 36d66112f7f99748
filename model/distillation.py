"""Distillation from a teacher during pretraining: BitDistill (arXiv 2510.13998, section 3.3).

The loss is L = L_CE + weight * T^2 * L_LD + relation_weight * L_AD (eq. 13): cross-entropy, the divergence from the
teacher's predictions (eq. 8 and 9, `model.loss.distillation_loss`), and the divergence from its attention relations at
one layer (eq. 10 to 12, `relation_loss`).

Dimensions in names: B sequences, T tokens, N = B * T rows, D hidden of a model, V vocabulary, A relation heads, W width
of a relation head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.strict import STRICT


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A teacher for a ternary phase, and how much it counts (BitDistill, arXiv 2510.13998)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    teacher: str | None = None
    """A 16-bit checkpoint of any kind, a folder or a URL; null: the run's own, from where this phase begins."""
    temperature: float = 5.0
    """T: the logits of both are divided by it before their softmaxes are compared."""
    weight: float = 1.0
    """Of T^2 * KL(teacher || student), added to the cross-entropy."""
    relation_weight: float = 0.0
    """Of the divergence of attention relations, added as well; 0 turns it off."""
    relation_layer: int | None = None
    """Block, counted from 0, whose relations are compared; null: the one at three quarters of the depth."""

    def __post_init__(self) -> None:
        problems = {}
        if self.temperature <= 0:
            problems["temperature"] = f"is {self.temperature}; must be above 0"
        for name in ("weight", "relation_weight", "relation_layer"):
            value = getattr(self, name)
            if value is not None and value < 0:
                problems[name] = f"is {value}; must be 0 or more"
        if self.relation_layer is not None and not self.relation_weight:
            problems["relation_layer"] = f"is {self.relation_layer}, but has no effect while relation_weight is 0"
        if problems:
            raise ValueError(problems)

    def layer_of(self, num_layers: int, student_layers: int) -> int:
        """The block of a model of ``num_layers`` at the depth of the student's block that is compared."""
        layer = 3 * student_layers // 4 if self.relation_layer is None else self.relation_layer
        return layer * num_layers // student_layers


class Lesson(NamedTuple):
    """The teacher's outputs for one micro-batch, without gradient."""

    hidden: Tensor
    """Hidden states after the last norm, `[B, T, D]`."""
    head: Tensor
    """Its output head, `[V, D]`."""
    relations: tuple[Tensor, ...]
    """Queries, keys and values `[B, T, width]` of the block that is compared; empty if none is."""
    relation_heads: int
    """Heads that those are split into at most: the number of its key-value heads."""
    config: DistillationConfig


@contextmanager
def watched_projections(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the queries, keys and values of a block while a forward pass runs, as its projections return them."""
    seen: list[Tensor] = []
    projections = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in projections]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def relation_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], num_heads: tuple[int, int]) -> Tensor:
    """Divergence of attention relations, L_AD of BitDistill (arXiv 2510.13998, eq. 10 to 12), which is MiniLM's.

    Queries, keys and values A are each split into heads A_a, and each token's relation to all others is
    R_a = softmax(A_a A_a^T / sqrt(W)). The loss is the sum over the three of the mean over sequences, heads and tokens
    of KL(R of the teacher || R of the student), in nats, float32, with all coefficients alpha at 1. As in the paper,
    relations are not causal. They are compared for one sequence at a time, and computed again in the backward pass:
    2 * A * T * T floats exist at once.

    Args:
        student: queries, keys and values, `[B, T, width]` each.
        teacher: the same of the teacher, whose widths may be others.
        num_heads: key-value heads of student and teacher; the relation heads are their greatest common divisor, which
            divides all widths.
    """
    heads = gcd(*num_heads)
    loss = torch.zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32), device=student[0].device)
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        for student_TD, teacher_TD in zip(student_BTD, teacher_BTD, strict=True):
            divergence = checkpoint(_relation_divergence, student_TD, teacher_TD.detach(), heads, use_reentrant=False)
            loss = loss + divergence / len(student_BTD)
    return loss


def _relation_divergence(student_TD: Tensor, teacher_TD: Tensor, heads: int) -> Tensor:
    log_p_ATT, log_q_ATT = (_log_relations(x_TD, heads) for x_TD in (student_TD, teacher_TD))
    return F.kl_div(log_p_ATT, log_q_ATT, reduction="sum", log_target=True) / log_p_ATT[..., 0].numel()


def _log_relations(x_TD: Tensor, heads: int) -> Tensor:
    x_ATW = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)).unflatten(-1, (heads, -1)).transpose(0, 1)
    return (x_ATW @ x_ATW.mT / x_ATW.shape[-1] ** 0.5).log_softmax(-1)
