"""Cross-entropy of a linear head without its logits.

Logits of a whole batch are often the largest tensor of a training step: 8 sequences of 4096 tokens over 128,256 words
take 17 GB in float32, and their gradient as much again. The loss of one row needs no other row, so both functions here
walk over the rows in chunks. `linear_cross_entropy` takes the gradients of hidden states and weight from a chunk while
its logits are there, in the forward pass, and only scales them in the backward pass; the method is that of Liger Kernel
(arXiv 2410.10989). Memory: one chunk of logits, plus the two gradients.

Products run in the inputs' dtype; softmax, loss and the sum of the weight's gradient over chunks in float32 (float64
for float64). Dimensions in names: N rows (tokens), D hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
"""The label of a row that does not count, as in torch and Transformers."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int, z_loss: float
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        counts_N = (labels_N != IGNORED_LABEL).to(dtype)
        share_N = counts_N / counts_N.sum().clamp(min=1)
        loss = torch.zeros((), dtype=dtype, device=hidden_ND.device)

        for start in range(0, len(labels_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD, share_C = hidden_ND[rows], share_N[rows]
            logits_CV = (hidden_CD @ weight_VD.t()).to(dtype)
            log_partition_C, nll_C = _log_partition_and_nll(logits_CV, labels_N[rows])
            loss += (share_C * (nll_C + z_loss * log_partition_C.square())).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d(nll) = softmax - one_hot(label); d(log_partition^2) = 2 * log_partition * softmax
            factor_C = share_C * (1 + 2 * z_loss * log_partition_C)
            grad_CV = logits_CV.sub_(log_partition_C[:, None]).exp_().mul_(factor_C[:, None])
            grad_CV.scatter_add_(1, labels_N[rows, None].clamp(min=0), -share_C[:, None])
            grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.t() @ hidden_CD

        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = (grad_hidden_ND * grad_loss).to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _log_partition_and_nll(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the softmax's denominator, and cross-entropy (of label 0 where the label does not count)."""
    log_partition_C = logits_CV.logsumexp(-1)
    label_logits_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None]).squeeze(1)
    return log_partition_C, log_partition_C - label_logits_C


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int, z_loss: float
) -> Tensor:
    """Mean over the labels other than -100 of `nll + z_loss * log_partition^2`, where logits are hidden @ weight^T.

    The result is a scalar in nats, float32 (float64 for float64), differentiable once, by `hidden_ND` and `weight_VD`,
    which share a dtype. Labels are int64; if all are -100, loss and gradients are 0. At most `chunk_tokens` rows of
    logits exist at once. The squared log-partition keeps logits from drifting.
    """
    if not torch.is_grad_enabled():
        # A Function's needs_input_grad says what the inputs want, also where no gradient will be asked for.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk_tokens, z_loss)
    return loss


@torch.no_grad()
def token_nll(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Cross-entropy of every row in nats, `[N]`, float32 (float64 for float64), 0 at -100; for evaluation, no gradient.

    The arguments are those of `linear_cross_entropy`.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    nll_N = torch.empty(len(labels_N), dtype=dtype, device=hidden_ND.device)
    for start in range(0, len(labels_N), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits_CV = (hidden_ND[rows] @ weight_VD.t()).to(dtype)
        nll_N[rows] = _log_partition_and_nll(logits_CV, labels_N[rows])[1]
    return nll_N.masked_fill_(labels_N == IGNORED_LABEL, 0)
