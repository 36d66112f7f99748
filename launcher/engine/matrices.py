"""Sharded matrices put together: each on one rank, which works on it and sends the result back in parts.

The work is spread over the ranks. What comes out is the same, to the last bit, however the matrices are sharded.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.plan.muon import orthogonalize_flops


@dataclass(frozen=True)
class Piece:
    """This rank's part of a matrix: a range of it, flattened, that lies in a tensor of the optimizer."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element of the range."""
    length: int
    """0 if this rank has no part."""
    offset: int
    """Of the range in the tensor."""


class Exchange:
    """Puts matrices together on their owners, and sends them back.

    Args:
        pieces: of every matrix, in the same order on all ranks.
        group: the ranks that hold a matrix together; None if each holds all.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._shapes = {piece.name: piece.shape for piece in pieces}
        self._ranges: list[dict[str, tuple[int, int]]] = []
        """By rank and matrix: first element and length."""
        if group is not None:
            held = torch.tensor([(piece.start, piece.length) for piece in pieces]).reshape(-1, 2)
            everyones = [torch.empty_like(held) for _ in range(group.size())]
            dist.all_gather(everyones, held, group=group)
            self._ranges = [
                {piece.name: (start, length) for piece, (start, length) in zip(pieces, ranges.tolist(), strict=True)}
                for ranges in everyones
            ]

    def apply_(self, parts: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]) -> None:
        """Replace the parts of matrices by those of a function of each whole matrix; a collective.

        Args:
            parts: flat, of one dtype, in the same order on all ranks; empty where this rank has no part.
            function: of a matrix's name and the matrix, in that dtype; of the same shape.
        """
        if self._group is None:
            for name, part in parts.items():
                part.copy_(function(name, part.view(self._shapes[name])).reshape(-1))
            return
        mine, nothing = self._group.rank(), next(iter(parts.values())).new_empty(0)
        for owned in self._rounds(parts):
            sent = [parts.get(name, nothing) for name in owned]
            places = [ranges.get(owned[mine], (0, 0)) for ranges in self._ranges]
            arrived = self._all_to_all(sent, [length for _, length in places])
            whole = nothing
            if shape := self._shapes.get(owned[mine]):
                whole = nothing.new_empty(math.prod(shape))
                for (start, length), part in zip(places, arrived, strict=True):
                    whole[start : start + length] = part
                whole = function(owned[mine], whole.view(shape)).reshape(-1)
            answers = [whole[start : start + length] for start, length in places]
            for part, answer in zip(sent, self._all_to_all(answers, [len(part) for part in sent]), strict=True):
                part.copy_(answer)

    def _rounds(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The matrix of each rank in each round, "" for none; the largest go to the ranks that have the least work."""
        work = [0] * len(self._ranges)
        owned: list[list[str]] = [[] for _ in self._ranges]
        for name in sorted(names, key=lambda name: -orthogonalize_flops(self._shapes[name], 1)):
            owner = work.index(min(work))
            owned[owner].append(name)
            work[owner] += orthogonalize_flops(self._shapes[name], 1)
        return list(zip_longest(*owned, fillvalue=""))

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send a part to each rank; return what each has sent, of these lengths."""
        sent = torch.cat(list(parts))
        arrived = sent.new_empty(sum(lengths))
        width = sent.element_size()
        dist.all_to_all_single(
            arrived.view(torch.uint8),  # gloo does not know bf16
            sent.view(torch.uint8),
            [width * length for length in lengths],
            [width * len(part) for part in parts],
            group=self._group,
        )
        return list(arrived.split(list(lengths)))
