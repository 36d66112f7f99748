"""Distillation from a teacher during pretraining: BitDistill (arXiv 2510.13998, section 3.3).

The loss is L = L_CE + weight * T^2 * L_LD + relation_weight * L_AD (eq. 13): cross-entropy, the divergence from the
teacher's predictions (eq. 8 and 9, `model.loss.distillation_loss`), and the divergence from its attention relations at
one layer (eq. 10 to 12, `relation_loss`).

Dimensions in names: B sequences, T tokens, N = B * T rows, D hidden of a model, V vocabulary, A relation heads, W width
of a relation head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import DistillationConfig


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


def relation_loss(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    num_heads: tuple[int, int],
    counts_BT: Tensor,
    first_BT: Tensor | None = None,
) -> Tensor:
    """Divergence of attention relations, L_AD of BitDistill (arXiv 2510.13998, eq. 10 to 12), which is MiniLM's.

    Queries, keys and values A are each split into heads A_a, and each token's relation to all others of its document is
    R_a = softmax(A_a A_a^T / sqrt(W)). The loss is the sum over the three of the mean over heads and the tokens that
    count of KL(R of the teacher || R of the student), in nats, float32, with all coefficients alpha at 1. As in the
    paper, relations are not causal. They are compared for one sequence at a time, and computed again in the backward
    pass: 3 * A * T * T floats exist at once.

    Args:
        student: queries, keys and values, `[B, T, width]` each.
        teacher: the same of the teacher, whose widths may be others.
        num_heads: key-value heads of student and teacher; the relation heads are their greatest common divisor, which
            divides all widths.
        counts_BT: whether a token counts: its label does.
        first_BT: where each token's document begins (`model.documents.beginnings`); None: a row is one.
    """
    heads = gcd(*num_heads)
    loss = torch.zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32), device=student[0].device)
    share_BT = counts_BT.to(loss.dtype) / counts_BT.sum().clamp(min=1)
    documents = torch.zeros_like(counts_BT, dtype=torch.int64) if first_BT is None else first_BT
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        for student_TD, teacher_TD, *of_row in zip(student_BTD, teacher_BTD, share_BT, documents, strict=True):
            loss = loss + checkpoint(
                _relation_divergence, student_TD, teacher_TD.detach(), *of_row, heads, use_reentrant=False
            )
    return loss


def _relation_divergence(
    student_TD: Tensor, teacher_TD: Tensor, share_T: Tensor, first_T: Tensor, heads: int
) -> Tensor:
    log_p_ATT, log_q_ATT = (_log_relations(x_TD, first_T, heads) for x_TD in (student_TD, teacher_TD))
    divergence_AT = F.kl_div(log_p_ATT, log_q_ATT, reduction="none", log_target=True).sum(-1)
    return (divergence_AT * share_T).sum() / heads


def _log_relations(x_TD: Tensor, first_T: Tensor, heads: int) -> Tensor:
    x_ATW = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)).unflatten(-1, (heads, -1)).transpose(0, 1)
    scores_ATT = x_ATW @ x_ATW.mT / x_ATW.shape[-1] ** 0.5
    # Not -inf: a difference of two of these is 0, and its gradient too.
    far = torch.finfo(scores_ATT.dtype).min / 2
    return scores_ATT.masked_fill(first_T[:, None] != first_T, far).log_softmax(-1)
