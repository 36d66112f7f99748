"""Log-likelihoods of token rows of any length, in batches whose shapes depend on no choice.

The last bits of a matrix product depend on its shape, and in a ternary model a last bit can turn the code of an
activation, and with it a score. So the shape of a batch follows from the length of its rows alone: they are padded to
one of a few lengths, and as many of them go into a batch as make about `BATCH_TOKENS` tokens; the last batch is filled
up. There is no batch size to set. Batches are made before they are dealt out to the ranks, so that the number of ranks
changes no batch either. What stands behind a row, or beside it, no token of it sees.

Dimensions in names: B rows of a batch, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

BATCH_TOKENS = 4096
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Row:
    """Tokens, and for each the token behind it that is to be predicted, or -100 where that does not count."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def continuation_rows(context: Sequence[int], continuation: Sequence[int], window_tokens: int) -> list[Row]:
    """The rows in which a continuation counts, behind as much of its context as the window holds, one token at least.

    It is one row where the window holds the continuation. A longer one is cut into pieces of half a window, each in a
    row of its own, behind as much of all before it as the window holds; the sum over the rows is that of the whole.

    Raises:
        ValueError: one of both is empty.
    """
    if not context or not continuation:
        raise ValueError(f"a continuation of {len(continuation)} tokens behind {len(context)} has nothing to score")
    size = window_tokens if len(continuation) <= window_tokens else max(1, window_tokens // 2)
    rows = []
    for first in range(0, len(continuation), size):
        piece = tuple(continuation[first : first + size])
        tokens = (*context, *continuation[:first], *piece)[-window_tokens - 1 :]
        ignored = len(tokens) - 1 - len(piece)
        rows.append(Row(tuple(tokens[:-1]), (IGNORED_LABEL,) * ignored + piece))
    return rows


def padded_length(num_tokens: int, window_tokens: int) -> int:
    """The length that a row is padded to: two steps to a power of two (..., 64, 96, 128, ...), 16 at least."""
    unit = max(16, 1 << max(0, (num_tokens - 1).bit_length() - 2))
    return min(-(-num_tokens // unit) * unit, window_tokens)


@dataclass(frozen=True)
class Scorer:
    """A model that gives log-likelihoods, run by all ranks together."""

    token_nll: Callable[[Tensor, Tensor], Tensor]
    """The negative log-likelihood in nats of every label, [B, T], from tokens and labels, int64 [B, T]."""
    window_tokens: int
    """The longest row."""
    rank: int = 0
    world_size: int = 1
    reduce_sum: Callable[[Tensor], object] = lambda tensor: None
    """Sums a tensor over all ranks in place."""

    @torch.no_grad()
    def log_likelihoods(
        self, rows: Sequence[Row], advance: Callable[[int], None] = lambda num_rows: None
    ) -> list[float]:
        """The summed log-likelihood, in nats, of the labels of each row; a collective that is given the same rows.

        Args:
            rows: no longer than the window.
            advance: is told how many more of the rows are done, over all ranks, as far as this rank can tell.
        """
        batches = self._batches(rows)
        results = torch.zeros(len(rows), dtype=torch.float64)
        for first in range(0, len(batches), self.world_size):
            # Every rank runs the model equally often, as sharded models must: where batches run out, the last again.
            length, numbers = batches[min(first + self.rank, len(batches) - 1)]
            sums = -self._run(length, [rows[number] for number in numbers])
            if first + self.rank < len(batches):
                results[list(numbers)] = sums
            advance(sum(len(members) for _, members in batches[first : first + self.world_size]))
        self.reduce_sum(results)
        return results.tolist()

    def _batches(self, rows: Sequence[Row]) -> list[tuple[int, tuple[int, ...]]]:
        """Padded length and numbers of the rows of each batch, longest first."""
        lengths = [padded_length(len(row.tokens), self.window_tokens) for row in rows]
        batches = []
        for length, members in groupby(
            sorted(range(len(rows)), key=lambda n: (-lengths[n], n)), key=lengths.__getitem__
        ):
            numbers, size = tuple(members), rows_of_batch(length)
            batches += [(length, numbers[first : first + size]) for first in range(0, len(numbers), size)]
        return batches

    def _run(self, length: int, rows: Sequence[Row]) -> Tensor:
        """Sums over each row's labels, float64 [B], on the host."""
        tokens_BT = torch.zeros(rows_of_batch(length), length, dtype=torch.int64)
        labels_BT = torch.full_like(tokens_BT, IGNORED_LABEL)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row.tokens)] = torch.tensor(row.tokens)
            labels_BT[number, : len(row.labels)] = torch.tensor(row.labels)
        nll_BT = self.token_nll(tokens_BT, labels_BT)
        return nll_BT.double().sum(1)[: len(rows)].cpu()


def rows_of_batch(length: int) -> int:
    """How many rows of this padded length are a batch."""
    return max(1, BATCH_TOKENS // length)
