"""Learning from pairs: the chosen answer is to gain on the rejected one, compared with a reference model.

Direct Preference Optimization (arXiv 2305.18290, eq. 7): with the gain g of an answer, the sum over its tokens of
log p(token) - log p_reference(token), the loss of a pair is -log sigmoid(beta * (g_chosen - g_rejected)). Length-
normalized, g is the mean over the answer's tokens instead (arXiv 2411.15124, section 5.1.2, where beta is 5). Both are
what TRL's `DPOTrainer` computes, as `loss_type` `sigmoid` and `sigmoid_norm`.

Both answers of a pair are in one row, chosen and rejected in turns, each a document with its prompt (`data.pairs`). A
document counts if any label of it does.

The loss of a pair needs the log-probabilities of all its tokens before any gradient is known. So the head is run twice
over its chunks: first for these, then for the gradients, which are those of a weighted cross-entropy.

Dimensions: B rows, T tokens of a row, P pairs of a row at most, N = B * T, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import PreferenceConfig
from model.loss import IGNORED_LABEL, GradientOfLogits, token_nll, weighted_cross_entropy


class Reference(NamedTuple):
    """What the reference model gives for a batch."""

    log_probabilities: Tensor
    """Its log-probability of each answer, chosen and rejected, `[B, P, 2]`, float64, without gradient; P pairs or
    more."""
    config: PreferenceConfig
    rows: Tensor | None = None
    """`model.loss.counted_rows` of the batch's labels, if they are known without asking the device."""


def by_side(values_BT: Tensor, tokens_BT: Tensor) -> Tensor:
    """Sums over the chosen and the rejected document of each pair, `[B, P, 2]`, float64.

    Args:
        values_BT: of each token.
        tokens_BT: with the token that begins a document as its complement (`model.documents`).
    """
    documents_BT = ((tokens_BT < 0).cumsum(1) - 1).clamp(min=0)
    num_rows, num_tokens = tokens_BT.shape
    sums = torch.zeros(num_rows, num_tokens + num_tokens % 2, dtype=torch.float64, device=values_BT.device)
    # In float64, so that the order of additions on a GPU is lost in rounding.
    return sums.scatter_add(1, documents_BT, values_BT.double()).unflatten(1, (-1, 2))


def num_pairs(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """The pairs of a batch, 0-dim, int64; the arguments are those of `preferences`."""
    return (by_side(labels_BT != IGNORED_LABEL, tokens_BT) > 0).all(-1).sum()


def chosen_labels(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """The labels without those of rejected documents; the arguments are those of `preferences`."""
    return labels_BT.masked_fill((tokens_BT < 0).cumsum(1) % 2 == 0, IGNORED_LABEL)


def preferences(nll_BT: Tensor, tokens_BT: Tensor, labels_BT: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    """The loss, and the means that are logged, from the cross-entropy of every label.

    Args:
        nll_BT: of the model, 0 where a label does not count.
        tokens_BT: as of `by_side`.
        labels_BT: -100 where one does not count.
        reference: on the same batch.

    Returns:
        The mean loss over pairs, 0-dim, differentiable by `nll_BT`; and beside it, `[3]` without gradient, the loss,
        the margin beta * (g_chosen - g_rejected), and the share of pairs in which it is above 0. All are 0 without
        pairs.
    """
    num_pairs_at_most = reference.log_probabilities.shape[1]
    counts_BP2 = by_side(labels_BT != IGNORED_LABEL, tokens_BT)[:, :num_pairs_at_most]
    is_pair_BP = (counts_BP2 > 0).all(-1)
    gains_BP2 = -by_side(nll_BT, tokens_BT)[:, :num_pairs_at_most] - reference.log_probabilities
    if reference.config.length_normalized:
        gains_BP2 = gains_BP2 / counts_BP2.clamp(min=1)
    margins_BP = reference.config.beta * (gains_BP2[..., 0] - gains_BP2[..., 1])
    found_3BP = torch.stack([-F.logsigmoid(margins_BP), margins_BP, (margins_BP > 0).double()])
    means_3 = ((found_3BP * is_pair_BP).sum((1, 2)) / is_pair_BP.sum().clamp(min=1)).to(nll_BT.dtype)
    return means_3[0], means_3.detach()


def preference_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    labels_BT: Tensor,
    chunk_tokens: int,
    reference: Reference,
    compiled: GradientOfLogits | None = None,
) -> tuple[Tensor, Tensor]:
    """`preferences` of a linear head, differentiable once, by `hidden_ND` and `weight_VD`.

    Args:
        hidden_ND: hidden states; these and the next are those of `model.loss.linear_cross_entropy`.
        weight_VD: the head.
        tokens_BT: this and the next are those of `preferences`.
        labels_BT: the next tokens.
        chunk_tokens: rows of logits that exist at once.
        reference: on the same batch.
        compiled: as of `linear_cross_entropy`.
    """
    labels_N = labels_BT.flatten()
    nll_BT = token_nll(hidden_ND, weight_VD, labels_N, chunk_tokens, reference.rows).view_as(labels_BT)
    if not torch.is_grad_enabled():
        return preferences(nll_BT, tokens_BT, labels_BT, reference)
    nll_BT.requires_grad_()
    loss, parts = preferences(nll_BT, tokens_BT, labels_BT, reference)
    (slopes_BT,) = torch.autograd.grad(loss, nll_BT)
    weighted = weighted_cross_entropy(hidden_ND, weight_VD, labels_N, slopes_BT.flatten(), chunk_tokens, compiled)
    return weighted + (loss - weighted).detach(), parts
