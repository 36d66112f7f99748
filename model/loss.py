"""Cross-entropy of a linear head without its logits.

Logits of a whole batch are often the largest tensor of a training step: 8 sequences of 4096 tokens over 128,256 words
take 17 GB in float32, and their gradient as much again. The loss of one row needs no other row, so both functions here
walk over the rows in chunks. `linear_cross_entropy` takes the gradients of hidden states and weight from a chunk while
its logits are there, in the forward pass, and only scales them in the backward pass; the method is that of Liger Kernel
(arXiv 2410.10989). Memory: one chunk of logits, plus the two gradients. `distillation_loss` adds a teacher, and the
chunk of its logits.

Products run in the inputs' dtype; softmax, loss and the sum of the weight's gradient over chunks in float32 (float64
for float64). Dimensions in names: N rows (tokens), D hidden, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
"""The label of a row that does not count, as in torch and Transformers."""


def num_labels(labels: Tensor) -> Tensor:
    """How many labels count, 0-dim, int64."""
    return (labels != IGNORED_LABEL).sum()


def counted_rows(labels_NA: Tensor) -> Tensor:
    """Rows of which any label counts, int64, in order."""
    return (labels_NA != IGNORED_LABEL).any(1).nonzero().squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Returns the loss, and of a teacher's apart, without gradient, the cross-entropy and the divergence (else 0)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        z_loss: float,
        gradient_of_logits: "GradientOfLogits | None" = None,
        teacher: tuple[Tensor, Tensor] | None = None,
        temperature: float = 1.0,
        teacher_weight: float = 0.0,
        weights_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        counts_N = (labels_N != IGNORED_LABEL).to(dtype)
        share_N = counts_N / counts_N.sum().clamp(min=1) if weights_N is None else counts_N * weights_N.to(dtype)
        loss, mean_nll, mean_kl = (torch.zeros((), dtype=dtype, device=hidden_ND.device) for _ in range(3))

        for start in range(0, len(labels_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD, share_C = hidden_ND[rows], share_N[rows]
            logits_CV = hidden_CD @ weight_VD.t()
            if gradient_of_logits is not None and teacher is None and (needs_hidden or needs_weight):
                part, grad_CV = gradient_of_logits(logits_CV, labels_N[rows], share_C, z_loss)
                loss += part
            else:
                logits_CV = logits_CV.to(dtype)
                log_partition_C, nll_C = _log_partition_and_nll(logits_CV, labels_N[rows])
                loss += (share_C * (nll_C + z_loss * log_partition_C.square())).sum()
                kl_grad_CV = None
                if teacher is not None:
                    teacher_logits_CV = (teacher[0][rows] @ teacher[1].t()).to(dtype)
                    kl_C, kl_grad_CV = _divergence(logits_CV, teacher_logits_CV, temperature)
                    mean_nll += (share_C * nll_C).sum()
                    mean_kl += (share_C * kl_C).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # d(nll) = softmax - one_hot(label); d(log_partition^2) = 2 * log_partition * softmax
                factor_C = share_C * (1 + 2 * z_loss * log_partition_C)
                grad_CV = logits_CV.sub_(log_partition_C[:, None]).exp_().mul_(factor_C[:, None])
                grad_CV.scatter_add_(1, _tokens_of(labels_N[rows])[:, None], -share_C[:, None])
                if kl_grad_CV is not None:
                    grad_CV += kl_grad_CV.mul_((teacher_weight * temperature**2 * share_C)[:, None])
                grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.t(), hidden_CD)

        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(mean_nll, mean_kl)
        return loss + teacher_weight * temperature**2 * mean_kl, mean_nll, mean_kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = (grad_hidden_ND * grad_loss).to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, *(None,) * 8


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; on a GPU in one pass over the sum, which is as large as the head in fp32."""
    if total.device.type == "cuda" and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


GradientOfLogits = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def gradient_of_logits(logits_CV: Tensor, labels_C: Tensor, share_C: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and its gradient by their logits, written to be compiled: logits are never widened.

    Args:
        logits_CV: in the dtype of the product.
        labels_C: int64, -100 where a row does not count.
        share_C: of each row in the mean, 0 where it does not count.
        z_loss: weight of the squared log-partition.

    Returns:
        0-dim in the dtype of the shares, and the gradient in the dtype of the logits.
    """
    wide_CV = logits_CV.to(share_C.dtype)
    log_partition_C, nll_C = _log_partition_and_nll(wide_CV, labels_C)
    loss = (share_C * (nll_C + z_loss * log_partition_C.square())).sum()
    factor_C = share_C * (1 + 2 * z_loss * log_partition_C)
    is_label_CV = torch.arange(wide_CV.shape[1], device=labels_C.device) == labels_C[:, None]
    softmax_CV = (wide_CV - log_partition_C[:, None]).exp()
    grad_CV = softmax_CV * factor_C[:, None] - torch.where(is_label_CV, share_C[:, None], 0)
    return loss, grad_CV.to(logits_CV.dtype)


def _divergence(logits_CV: Tensor, teacher_logits_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each row, where p and q are the softmaxes of both logits over T, and its gradient by the logits.

    Overwrites the teacher's logits, so that four chunks exist at once and not more.
    """
    log_p_CV, log_q_CV = logits_CV / temperature, teacher_logits_CV.div_(temperature)
    for log_probabilities_CV in (log_p_CV, log_q_CV):
        log_probabilities_CV.sub_(log_probabilities_CV.logsumexp(-1, keepdim=True))
    q_CV = log_q_CV.exp()
    kl_C = log_q_CV.sub_(log_p_CV).mul_(q_CV).sum(-1)
    return kl_C, log_p_CV.exp_().sub_(q_CV).div_(temperature)


def _tokens_of(labels: Tensor) -> Tensor:
    """Labels, with token 0 in the place of those that do not count; other numbers below 0 are left, and an error."""
    return labels.masked_fill(labels == IGNORED_LABEL, 0)


def _log_partition_and_nll(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the softmax's denominator, and cross-entropy (of label 0 where the label does not count)."""
    log_partition_C = logits_CV.logsumexp(-1)
    label_logits_C = logits_CV.gather(1, _tokens_of(labels_C)[:, None]).squeeze(1)
    return log_partition_C, log_partition_C - label_logits_C


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk_tokens: int,
    z_loss: float,
    compiled: GradientOfLogits | None = None,
) -> Tensor:
    """Mean over the labels other than -100 of `nll + z_loss * log_partition^2`, where logits are hidden @ weight^T.

    The result is a scalar in nats, float32 (float64 for float64), differentiable once, by `hidden_ND` and `weight_VD`,
    which share a dtype. Labels are int64; if all are -100, loss and gradients are 0. At most `chunk_tokens` rows of
    logits exist at once. The squared log-partition keeps logits from drifting. `compiled` is `gradient_of_logits`,
    compiled; without it, the same is done step by step.
    """
    if not torch.is_grad_enabled():
        # A Function's needs_input_grad says what the inputs want, also where no gradient will be asked for.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk_tokens, z_loss, compiled)[0]
    return loss


def weighted_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    chunk_tokens: int,
    compiled: GradientOfLogits | None = None,
) -> Tensor:
    """As `linear_cross_entropy`, without z-loss: the sum of the labels' cross-entropies, each times its own weight.

    Weights may have any sign, and get no gradient.
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, chunk_tokens, 0.0, compiled, None, 1.0, 0.0, weights_N
    )[0]
    return loss


def distillation_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk_tokens: int,
    z_loss: float,
    *,
    teacher: tuple[Tensor, Tensor],
    temperature: float,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` plus `weight * T^2 * KL(teacher || student)`, the mean over the labels that count.

    The divergence is that of the softmaxes of both logits over the temperature T (BitDistill, arXiv 2510.13998, eq. 8
    and 9). T^2 keeps its gradient as large as that of the cross-entropy (arXiv 1503.02531, section 2); BitDistill has
    it in its weight.

    Args:
        hidden_ND: of the student; this and the next four are those of `linear_cross_entropy`.
        weight_VD: the student's head.
        labels_N: the next tokens.
        chunk_tokens: rows of logits, of student and teacher each, that exist at once.
        z_loss: weight of the squared log-partition.
        teacher: its hidden states `[N, D']` and head `[V, D']`, which get no gradient.
        temperature: T, above 0.
        weight: of the divergence.

    Returns:
        The loss, as of `linear_cross_entropy`; and apart, without gradient and in nats, the cross-entropy alone, and
        the divergence, without weight and T^2.

    Raises:
        ValueError: the teacher has another vocabulary.
    """
    teacher_hidden_ND, teacher_weight_VD = teacher
    if len(teacher_weight_VD) != len(weight_VD):
        raise ValueError(f"the teacher has {len(teacher_weight_VD)} tokens, but the student has {len(weight_VD)}")
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    teacher = teacher_hidden_ND.detach(), teacher_weight_VD.detach()
    losses: tuple[Tensor, Tensor, Tensor] = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, chunk_tokens, z_loss, None, teacher, temperature, weight
    )
    return losses


@torch.no_grad()
def token_nll(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int, rows: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every label in nats, float32 (float64 for float64), 0 at -100; for evaluation, no gradient.

    Only rows that count meet the head. The last chunk of them is filled up to `chunk_tokens` rows (or an eighth of N,
    if that is less), so that every product has one shape: its last bits, which depend on the shape, are the same
    wherever a row stands and whatever else counts.

    Args:
        hidden_ND: hidden states; these and the next are those of `linear_cross_entropy`.
        weight_VD: the head.
        labels_N: int64, `[N]`; or `[N, A]`, where each row is asked for A labels.
        chunk_tokens: rows of logits that exist at once.
        rows: those that count, int64, in order. Unless they are given, the host waits for the device to count them.

    Returns:
        The shape of the labels.
    """
    return token_nll_and_misses(hidden_ND, weight_VD, labels_N, chunk_tokens, misses=False, rows=rows)[0]


@torch.no_grad()
def token_nll_and_misses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk_tokens: int,
    *,
    misses: bool = True,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_nll`, and whether greedy decoding would choose another token than the label: 1 if so, 0 if not or at -100.

    Args:
        hidden_ND: these and the next three are those of `token_nll`.
        weight_VD: the head.
        labels_N: the labels.
        chunk_tokens: rows of logits that exist at once.
        misses: whether to look for these; zeros otherwise.
        rows: as of `token_nll`.

    Returns:
        Both in the shape and dtype of the result of `token_nll`, whose bits are the same.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    labels_NA = labels_N if labels_N.dim() == 2 else labels_N[:, None]
    nll_NA = torch.zeros(labels_NA.shape, dtype=dtype, device=hidden_ND.device)
    misses_NA = torch.zeros_like(nll_NA)
    counted = counted_rows(labels_NA) if rows is None else rows
    size = max(1, min(chunk_tokens, -(-len(labels_NA) // 8)))
    for start in range(0, len(counted), size):
        rows_C = counted[start : start + size]
        filled_C = F.pad(rows_C, (0, size - len(rows_C)))
        logits_CV = (hidden_ND[filled_C] @ weight_VD.t()).to(dtype)
        label_logits_CA = logits_CV.gather(1, _tokens_of(labels_NA[filled_C]))
        nll_NA[rows_C] = (logits_CV.logsumexp(-1)[:, None] - label_logits_CA)[: len(rows_C)]
        if misses:
            misses_NA[rows_C] = (logits_CV.argmax(-1)[: len(rows_C), None] != labels_NA[rows_C]).to(dtype)
    ignored_NA = labels_NA == IGNORED_LABEL
    return nll_NA.masked_fill_(ignored_NA, 0).view_as(labels_N), misses_NA.masked_fill_(ignored_NA, 0).view_as(labels_N)
