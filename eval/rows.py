"""Compute log-likelihoods of token rows of any length, in batches whose shapes do not depend on options.

The last bits of a matrix product depend on its shape, and in a ternary model a last bit can turn the code of an
activation, and with it a score. So the shape of a batch follows from the length of its rows alone: they are padded to
one of a few lengths, and as many of them go into a batch as make about 4096 tokens, on a CPU 512, which is as fast
there. The last batch of a length is filled up. There is no batch size to set. Batches are made before they are dealt
out to the ranks, so that the number of ranks changes no batch either. What comes after a row, or beside it, no token
of it sees.

Rows with the same tokens, of which only labels differ, are run once: answers of one token after one question.

Dimensions in names: B rows of a batch, T tokens of a row, A labels of a token, R rows in all, Q quantities.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

BATCH_TOKENS = 4096
CPU_BATCH_TOKENS = 512
IGNORED_LABEL = -100
Packed = bytes
"""Token ids, int32, one after the other: a tenth of the memory of a tuple, and as good a key."""
ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, and the next tokens, which are to be predicted. A run keeps those of its tasks as long as it trains."""

    packed_tokens: Packed
    packed_labels: Packed
    """Of the last tokens; those before them predict nothing that counts."""

    @classmethod
    def of(cls, tokens: Sequence[int], labels: Sequence[int]) -> Self:
        """Make a row; ``labels`` are those of its last tokens, and -100 does not count."""
        assert len(labels) <= len(tokens)
        return cls(np.array(tokens, np.int32).tobytes(), np.array(labels, np.int32).tobytes())

    @property
    def tokens(self) -> list[int]:
        """The tokens."""
        return unpacked(self.packed_tokens).tolist()

    @property
    def labels(self) -> list[int]:
        """For each token the next one, or -100 where that does not count."""
        labels = unpacked(self.packed_labels).tolist()
        return [IGNORED_LABEL] * (len(self.packed_tokens) // ID_BYTES - len(labels)) + labels


def unpacked(ids: Packed) -> np.ndarray:
    """Token ids, int32 [T]."""
    return np.frombuffer(ids, np.int32)


def continuation_rows(context: Sequence[int], continuation: Sequence[int], window_tokens: int) -> list[Row]:
    """The rows in which a continuation counts, after as much of its context as the window holds, at least one token.

    It is one row where the window holds the continuation. A longer one is cut into pieces of half a window, each in a
    row of its own, after as much preceding text as the window holds; the sum over the rows is that of the whole.

    Raises:
        ValueError: one of both is empty.
    """
    if not context or not continuation:
        raise ValueError(f"a continuation of {len(continuation)} tokens after {len(context)} has nothing to score")
    size = window_tokens if len(continuation) <= window_tokens else max(1, window_tokens // 2)
    rows = []
    for first in range(0, len(continuation), size):
        piece = continuation[first : first + size]
        tokens = [*context, *continuation[:first], *piece][-window_tokens - 1 :]
        rows.append(Row.of(tokens[:-1], piece))
    return rows


def padded_length(num_tokens: int, window_tokens: int) -> int:
    """The length that a row is padded to: two steps to a power of two (..., 64, 96, 128, ...), 16 at least."""
    unit = max(16, 1 << max(0, (num_tokens - 1).bit_length() - 2))
    return min(-(-num_tokens // unit) * unit, window_tokens)


@dataclass(frozen=True)
class Scorer:
    """A model that gives log-likelihoods, run by all ranks together."""

    token_nll: Callable[[Tensor, Tensor], Tensor]
    """The negative log-likelihood in nats of every label, [B, T, A], from tokens, int64 [B, T], and labels."""
    window_tokens: int
    """The longest row."""
    rank: int = 0
    world_size: int = 1
    reduce_sum: Callable[[Tensor], object] = lambda tensor: None
    """Sums a tensor over all ranks in place."""
    batch_tokens: int = BATCH_TOKENS
    """Approximate tokens of a batch; the same for all scores that are to be compared to the last bit."""
    token_nll_and_misses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """As `token_nll`, and beside it 1 where a label is not the likeliest token; None where nobody asks for it."""

    def log_likelihoods(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda num_rows: None
    ) -> list[float]:
        """The summed log-likelihood, in nats, of the labels of each row; a collective that is given the same rows.

        Args:
            rows: no longer than the window.
            advance: called with the rows finished since the last call, over all ranks, as far as this rank knows.
        """
        [found_R] = self._sums(rows, advance, lambda tokens_BT, labels_BTA: (self.token_nll(tokens_BT, labels_BTA),))
        return found_R.tolist()

    def greedy_log_likelihoods(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda num_rows: None
    ) -> list[tuple[float, bool]]:
        """As `log_likelihoods`, each with whether greedy decoding would write exactly the labels; a collective."""
        assert self.token_nll_and_misses is not None
        found_R, misses_R = self._sums(rows, advance, self.token_nll_and_misses, 2)
        return list(zip(found_R.tolist(), (misses_R == 0).tolist(), strict=True))

    @torch.no_grad()
    def _sums(
        self,
        rows: Sequence[Row],
        advance: Callable[[int], None],
        quantities: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        num_quantities: int = 1,
    ) -> Tensor:
        """The negative sums of quantities over the labels of each row, float64 `[Q, R]`, on the host."""
        alike: dict[Packed, dict[Packed, list[int]]] = {}
        for number, row in enumerate(rows):
            alike.setdefault(row.packed_tokens, {}).setdefault(row.packed_labels, []).append(number)
        batches = self._batches(alike)
        results = torch.zeros(num_quantities * len(rows), dtype=torch.float64)
        results_QR = results.view(num_quantities, len(rows))
        for first in range(0, len(batches), self.world_size):
            # Every rank runs the model equally often, as sharded models must: where batches run out, the last again.
            length, members = batches[min(first + self.rank, len(batches) - 1)]
            sums_BQA = -self._run(length, {tokens: alike[tokens] for tokens in members}, quantities)
            if first + self.rank < len(batches):
                for tokens, sums_QA in zip(members, sums_BQA, strict=True):
                    for place, numbers in enumerate(alike[tokens].values()):
                        results_QR[:, numbers] = sums_QA[:, place, None]
            done = (tokens for _, members in batches[first : first + self.world_size] for tokens in members)
            advance(sum(len(numbers) for tokens in done for numbers in alike[tokens].values()))
        self.reduce_sum(results)
        return results_QR

    def _batches(self, different: Iterable[Packed]) -> list[tuple[int, list[Packed]]]:
        """Padded length and tokens of the rows of each batch, longest first."""
        by_length: dict[int, list[Packed]] = {}
        for tokens in different:
            by_length.setdefault(padded_length(len(tokens) // ID_BYTES, self.window_tokens), []).append(tokens)
        return [
            (length, members[first : first + self._rows_of_batch(length)])
            for length, members in sorted(by_length.items(), reverse=True)
            for first in range(0, len(members), self._rows_of_batch(length))
        ]

    def _run(
        self,
        length: int,
        rows: Mapping[Packed, Collection[Packed]],
        quantities: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> Tensor:
        """Sums over labels, float64 [B, Q, A], on the host, of tokens with all their labels."""
        tokens_BT = np.zeros((self._rows_of_batch(length), length), np.int64)
        most = max(map(len, rows.values()))
        labels_BTA = np.full((*tokens_BT.shape, most), IGNORED_LABEL)
        for number, (tokens, labels) in enumerate(rows.items()):
            end = len(tokens) // ID_BYTES
            tokens_BT[number, :end] = unpacked(tokens)
            for place, wanted in enumerate(labels):
                labels_BTA[number, end - len(wanted) // ID_BYTES : end, place] = unpacked(wanted)
        found = quantities(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BTA))
        # Sums of one shape, in the order of which A has no part.
        sums = [[x_BT.contiguous().sum(1) for x_BT in x_BTA.double().unbind(2)] for x_BTA in found]
        return torch.stack([torch.stack(sums_of_labels, 1) for sums_of_labels in sums], 1)[: len(rows)].cpu()

    def _rows_of_batch(self, length: int) -> int:
        """How many rows of this padded length are a batch."""
        return max(1, self.batch_tokens // length)
