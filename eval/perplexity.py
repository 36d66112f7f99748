"""Measure the loss on text, per token and per byte.

Bits per byte compare models with different tokenizers: the negative log-likelihood of the text, in bits, over its
length in UTF-8 bytes (arXiv 2101.00027, section 3.1). Tokens that stand for no text (the one that a document begins
with, or that ends it) count in neither.

`held_out_loss` is for rows of tokens, as training has them. `text_loss` is for text of any length, which windows are
laid over. Every token is predicted once. With a stride of the whole window a window sees nothing of the one before it;
a smaller stride lets windows overlap, and each but the first predicts only the tokens at its end, with more before them
to go by.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.documents import Document
from data.errors import DataError
from data.tokenizer import Tokenizer
from eval.errors import NotFiniteError
from eval.rows import BATCH_TOKENS, IGNORED_LABEL, Row, Scorer


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
        token_bytes_V: UTF-8 bytes of text of each token of the vocabulary.
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


TOKENS_AT_ONCE = 64 * BATCH_TOKENS
"""Tokens gathered before the model runs; otherwise a large file would be in memory as rows."""

LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class TextLoss:
    """Loss on text; every token of it counts."""

    nats: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_changed_documents: int
    """Documents that the tokenizer does not give back: what it lost costs no bits."""

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer; infinite where a float cannot hold it."""
        nats_per_token = self.nats / self.num_tokens
        return math.exp(nats_per_token) if nats_per_token < LARGEST_EXPONENT else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Of text in UTF-8."""
        return self.nats / math.log(2) / self.num_bytes


def text_loss(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    first_token: int,
    stride_tokens: int,
    apart: bool = True,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> TextLoss:
    """Measure a model on documents; a collective that is given the same documents on every rank.

    Args:
        scorer: the model; its window is the one laid over the text.
        tokenizer: its tokenizer.
        documents: texts.
        first_token: the token that a text begins with; it is put in front of each document.
        stride_tokens: by how much windows are moved; the window at most.
        apart: start each document afresh, so that nothing is seen of the one before it; else they are one stream, as in
            training.
        advance: called with the bytes of text finished since the last call.

    Raises:
        DataError: there is no text.
        NotFiniteError: a log-likelihood is NaN or infinite; names the first such document.
    """
    assert 0 < stride_tokens <= scorer.window_tokens, stride_tokens
    nats, counted = [], [0, 0, 0, 0]
    for rows, origins, numbers in _gathered(scorer, tokenizer, documents, first_token, stride_tokens, apart):
        for found, origin in zip(scorer.log_likelihoods(rows), origins, strict=True):
            if not math.isfinite(found):
                raise NotFiniteError(f"{origin}: the log-likelihood of the text is {found}")
            nats.append(-found)
        counted = [total + more for total, more in zip(counted, numbers, strict=True)]
        advance(numbers[1])
    num_tokens, num_bytes, num_documents, num_changed = counted
    if not num_tokens:
        raise DataError("the documents contain no text")
    return TextLoss(math.fsum(nats), num_tokens, num_bytes, num_documents, num_changed)


def _gathered(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    first_token: int,
    stride_tokens: int,
    apart: bool,
) -> Iterator[tuple[list[Row], list[str], tuple[int, int, int, int]]]:
    """Rows of many documents, with the origin of each, and counts: tokens, bytes, documents, changed documents."""
    rows: list[Row] = []
    origins: list[str] = []
    tokens: list[int] = []
    labels: list[int] = []
    num_tokens = num_bytes = num_documents = num_changed = 0

    def cut(origin: str) -> None:
        new = list(windows(tokens, labels, scorer.window_tokens, stride_tokens))
        rows.extend(new)
        origins.extend([origin] * len(new))
        tokens.clear()
        labels.clear()

    for document in documents:
        if not document.text:
            continue
        [text] = tokenizer.encode_batch([document.text])
        num_tokens += len(text)
        num_bytes += len(document.text.encode())
        num_documents += 1
        num_changed += tokenizer.decode(text) != document.text
        tokens += [first_token, *text]
        labels += [IGNORED_LABEL, *text]
        if apart:
            cut(document.origin)
        if num_tokens >= TOKENS_AT_ONCE and apart:
            yield rows, origins, (num_tokens, num_bytes, num_documents, num_changed)
            rows, origins, num_tokens, num_bytes, num_documents, num_changed = [], [], 0, 0, 0, 0
    if tokens:
        cut("the stream of documents")
    yield rows, origins, (num_tokens, num_bytes, num_documents, num_changed)


def windows(tokens: Sequence[int], labels: Sequence[int], window_tokens: int, stride_tokens: int) -> Iterator[Row]:
    """Rows in which every label of a stream but the first counts exactly once; -100 counts nowhere."""
    done = 0  # labels predicted so far, of all but the first token
    for begin in range(0, len(tokens) - 1, stride_tokens):
        stop = min(begin + window_tokens, len(tokens) - 1)
        ignored = max(0, done - begin)
        yield Row.of(tokens[begin:stop], labels[begin + 1 + ignored : stop + 1])
        done = stop
        if stop == len(tokens) - 1:
            return
