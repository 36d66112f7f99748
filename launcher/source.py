"""What a model's state is read from: one interface over our own checkpoints and those of others.

A source is read by range, so that a rank reads only what it holds, and a conversion one tensor at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; says which file, what is wrong and what to do."""


class Source(ABC):
    """Weights by name, and Adam's state where there is one."""

    location: str
    """Where it is, for messages."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every parameter, by Hugging Face name."""
    has_moments: bool
    """Whether `exp_avg`, `exp_avg_sq` and the step are there, for every parameter."""
    missing: tuple[str, ...] = ()
    """One sentence for each thing a run has that this format does not carry."""

    @abstractmethod
    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` up to ``start + length`` of a flattened tensor, as fp32 of its own memory.

        Args:
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
            name: of the parameter.
            start: first element.
            length: number of elements.

        Raises:
            CheckpointError: the file is damaged, or holds less.
        """

    @abstractmethod
    def read_step(self, name: str) -> float:
        """Number of updates behind the moments of a parameter."""
