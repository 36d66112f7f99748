"""Held-out loss, per token and per byte of text.

Bits per byte compare models with different tokenizers: the negative log-likelihood of the text, in bits, over its
length in UTF-8 bytes (arXiv 2101.00027, section 3.1). Tokens that stand for no text (end of document) count in neither.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out text."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def held_out_loss(
    token_nll: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes_V: Tensor,
    reduce_sum: Callable[[Tensor], None],
) -> HeldOutLoss:
    """Measure a model on held-out rows.

    Args:
        token_nll: gives the negative log-likelihood in nats of every label, [B, T], from tokens and labels [B, T].
        batches: tokens and labels, int64 [B, T]; labels of -100 do not count.
        token_bytes_V: UTF-8 bytes of text behind each token of the vocabulary.
        reduce_sum: sums a tensor over all ranks in place.

    Returns:
        The loss over all ranks' batches. NaN where there is no text at all.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # nats, tokens, nats of tokens with text, bytes
    for tokens_BT, labels_BT in batches:
        nll_BT = token_nll(tokens_BT, labels_BT).double().cpu()
        counted_BT = labels_BT != -100
        bytes_BT = token_bytes_V[labels_BT.clamp(min=0)] * counted_BT
        sums += torch.stack(
            [nll_BT.sum(), counted_BT.sum(), (nll_BT * (bytes_BT > 0)).sum(), bytes_BT.sum()],
        )
    reduce_sum(sums)
    nats, num_tokens, text_nats, num_bytes = sums.tolist()
    return HeldOutLoss(
        nats_per_token=nats / num_tokens if num_tokens else math.nan,
        bits_per_byte=text_nats / math.log(2) / num_bytes if num_bytes else math.nan,
        num_tokens=int(num_tokens),
    )
