"""The interface for reading a model's state, from Tritrain's checkpoints and from those of others.

A source is read by range, so that a rank reads only what it holds, and a conversion one tensor at a time.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from launcher.engine.contract import AVERAGE, MOMENTS
from launcher.errors import CheckpointError

KINDS = ("weight", *MOMENTS)


PIECE_ELEMENTS = 4 * 2**20
"""Elements that a conversion reads at once: 16 MiB of fp32."""


@dataclass(frozen=True)
class Grown:
    """A matrix with more rows than a source has stored, all of them the same."""

    stored: int
    """Rows that are stored."""
    row: Tensor
    """The value of the others, fp32, [H]; their moments are 0."""


class Source(ABC):
    """Weights by name, and the optimizer's state if it is stored."""

    location: str
    """Where it is, for messages."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every parameter, by Hugging Face name."""
    has_moments: bool
    """Whether moments and the step are stored for every parameter, see `kinds`."""
    averaged_tokens: int | None = None
    """Tokens of the steps in the averaged weights; None if there are none."""
    constants: Mapping[str, float] = {}
    """Parameters that are not stored and have one value in all elements, see `launcher.inference.sub_norms`."""
    grown: Mapping[str, Grown] = {}
    """Parameters with rows that are not stored, after those that are, see `launcher.inference.vocabulary`."""
    missing: tuple[str, ...] = ()
    """One sentence for each thing a run has that this format does not carry."""
    stored_dtypes: frozenset[torch.dtype] = frozenset()
    """In which the weights are stored, as far as another program chose them."""
    is_packed: bool = False
    """Whether quantized matrices are stored as codes and their levels, and not as weights."""
    puts_first_token: bool | None = None
    """Whether `first_token` is in front of every text; None leaves it to the tokenizer's files."""

    @property
    def first_token(self) -> int | None:
        """The token before a text, see `launcher.formats.tokens.puts_first`; None if the source does not say it."""
        return None

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is stored of a parameter: of a matrix that Muon has updated there is no `exp_avg_sq`."""
        return stored_kinds(has_moments=self.has_moments, has_average=self.averaged_tokens is not None)

    @abstractmethod
    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` up to ``start + length`` of a flattened tensor, as fp32 of its own memory.

        Args:
            kind: `weight`, `exp_avg`, `exp_avg_sq` or `average`.
            name: of the parameter.
            start: first element.
            length: number of elements.

        Raises:
            CheckpointError: the file is damaged, or holds less.
        """

    def read_finite(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements as `read` gives them, of a model that can be trained and run.

        Raises:
            CheckpointError: as `read`; or one of them is NaN or infinite.
        """
        if name in self.constants:
            return torch.full((length,), self.constants[name])
        if name in self.grown:
            row_H = self.grown[name].row
            if (after := start + length - prod(self.stored_shape(name))) > 0:
                stored = max(0, length - after)
                values = self._stored_finite(kind, name, start, stored) if stored else torch.empty(0)
                elements = torch.arange(start + stored, start + length) % len(row_H)
                return torch.cat([values, torch.zeros(len(elements)) if kind in MOMENTS else row_H[elements]])
        return self._stored_finite(kind, name, start, length)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter as it is stored."""
        grown = self.grown.get(name)
        return self.shapes[name] if grown is None else (grown.stored, *self.shapes[name][1:])

    def _stored_finite(self, kind: str, name: str, start: int, length: int) -> Tensor:
        values = self.read(kind, name, start, length)
        if not (finite := values.isfinite()).all():
            first = start + int((~finite).nonzero()[0, 0])
            raise CheckpointError(
                f"{self.location}: {int((~finite).sum())} of {length} elements of {name} ({kind}) are NaN or infinite, "
                f"the first at {first}: the model is broken; take an earlier checkpoint of it"
            )
        return values

    @abstractmethod
    def read_step(self, name: str) -> float:
        """The number of updates that a parameter's moments have seen."""

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        """The codes of a matrix of a packed source, as `quant.codes.pack` has them, and their level.

        Args:
            name: of the parameter.

        Returns:
            uint8 [R, I], with rows of zeros up to a multiple of 4; fp32 [1, 1], [O, 1] or [O, groups].

        Raises:
            CheckpointError: a code or the level is none that may be there.
        """
        raise NotImplementedError

    def check_ahead(self, kinds: Sequence[str]) -> None:  # noqa: B027 (most have nothing to check ahead)
        """Verify checksums ahead of reading; sources without checksums do nothing.

        It runs in a thread of its own. `read` raises the same errors again.
        """


def stored_kinds(*, has_moments: bool, has_variance: bool = True, has_average: bool = False) -> tuple[str, ...]:
    """What is stored of a parameter."""
    return (*KINDS[: 1 + has_moments * (1 + has_variance)], *((AVERAGE,) if has_average else ()))


def start_checking(source: Source, kinds: Sequence[str]) -> None:
    """Verify in a thread what is about to be read, so that reading and writing overlap."""

    def check() -> None:
        with suppress(CheckpointError):
            source.check_ahead(kinds)

    threading.Thread(target=check, daemon=True).start()


def in_pieces(source: Source, kind: str, name: str) -> Iterator[Tensor]:
    """A flattened tensor of a source, a piece at a time; a thread reads the next one while one is in use."""
    length = prod(source.shapes[name])
    starts = iter(range(0, length, PIECE_ELEMENTS))

    def read_next() -> Tensor | None:
        start = next(starts, None)
        return None if start is None else source.read_finite(kind, name, start, min(PIECE_ELEMENTS, length - start))

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read_next)
        while (piece := coming.result()) is not None:
            coming = pool.submit(read_next)
            yield piece
