"""Models as anyone publishes them, opened for `tritrain verify`: what is stored, sound or not.

A `Source` refuses a damaged model. These are read as far as they go, and what is wrong is collected, since somebody
wants to know all of it. Nothing of a file runs, and one parameter is in memory at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.hf import FAMILIES
from model.size import parameter_shapes
from quant.config import Activations
from quant.rounding import dequantize

GROUP_SIZES = (128, 64, 32)
"""Neighbors in a row that may share a level, where a format does not say it."""


class Coded(NamedTuple):
    """A matrix of codes and their levels."""

    codes: Tensor
    """int8 [O, I]; anything but -1, 0 and +1 is stored like that."""
    level: Tensor
    """fp32, [1, 1], [O, 1] or [O, groups of a row]."""

    def values(self) -> Tensor:
        """Codes times their level, fp32 [O, I]."""
        return dequantize(self.codes, self.level)

    def inverted(self) -> "Coded":
        """The matrix if the levels that are stored were their reciprocals; a level of 0 stays."""
        return self._replace(level=torch.where(self.level == 0, self.level, 1 / self.level))


class Published(ABC):
    """A model in a folder or file, opened."""

    location: str
    form: str
    """The format, for people."""
    config: ModelConfig | None = None
    """None if Tritrain does not know the architecture; a note says why."""
    stored: Collection[str] = ()
    """Names of the parameters, Hugging Face's where the architecture is known."""
    inputs: Activations = "none"
    """The rounding of the inputs of layers with codes."""
    only_ternary: bool = False
    """Whether the format of the codes has no others than -1, 0 and +1."""
    first_token: int | None = None
    """The token before a text, as far as the model says it."""
    puts_first_token: bool | None = None
    """See `launcher.checkpoint.source.Source`."""
    stored_dtypes: frozenset[torch.dtype] = frozenset()
    """Of the matrices that are stored as weights; formats have norms in fp32, whatever they were in."""
    vocabulary_size: int | None = None
    """Tokens of the vocabulary that the file itself holds; None if the tokenizer is a file of its own."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.problems: list[str] = []
        """What is wrong, in sentences."""
        self.notes: list[str] = []
        """What was not looked at, and why."""

    @abstractmethod
    def read(self, name: str) -> Tensor | Coded:
        """A parameter: fp32, or codes.

        Raises:
            CheckpointError: it cannot be read, or is not what belongs there.
        """

    def tied_problem(self) -> str | None:
        """What is wrong with a head that is stored besides the embedding that it is tied to; None if nothing is."""
        return None

    def is_coded(self, name: str) -> bool:
        """Return whether the format has codes for a parameter, of 2 bits or more."""
        return False

    @abstractmethod
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file on this machine; None if there is none.

        Raises:
            DataError: it cannot be read.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if there is none.

        Raises:
            DataError: it cannot be read.
        """
        file = self.tokenizer_file()
        return None if file is None else load_tokenizer(file)

    def compare_names(self, shown: Mapping[str, str] | None = None, ignored: Collection[str] = ()) -> None:
        """Note parameters of the architecture that are missing, and others that it does not have.

        Args:
            shown: the file's own names, by parameter; None: they are the same.
            ignored: stored names that no model of this kind minds.
        """
        if self.config is None:
            return
        expected = parameter_shapes(self.config)
        missing = [(shown or {}).get(name, name) for name in expected if name not in self.stored]
        unknown = [name for name in self.stored if name not in expected and name not in ignored]
        if missing:
            self.problems.append(
                f"{counted(missing, 'parameter')} of the architecture {_are(missing)} missing: {named(missing)}; "
                "export the model again, or take a complete copy"
            )
        if unknown:
            self.problems.append(
                f"{counted(unknown, 'tensor')} {_are(unknown)} not known to the architecture: {named(unknown)}; "
                "programs refuse such a model or leave them out"
            )


def family_of(config: ModelConfig) -> str:
    """The first family of Hugging Face with the traits of a model, for people; '' if there is none."""
    traits = (config.norm, config.norm_position, config.qk_norm, config.sub_norm, config.qkv_bias)
    return next((name for name, theirs in FAMILIES.items() if theirs == traits), "")


def codes_of_values(values_OI: Tensor, widths: Collection[int] = ()) -> Coded | None:
    """The codes of a matrix that is stored as weights, if a level times -1, 0 and +1 is all that it holds.

    Args:
        values_OI: fp32.
        widths: neighbors in a row that may share a level; by default the row, or `GROUP_SIZES`.
    """
    I = values_OI.shape[1]  # noqa: E741
    for width in widths or (I, *GROUP_SIZES):
        if I % width or not I:
            continue
        for rows in (values_OI[:8], values_OI):  # most matrices are not ternary, and the first rows show it
            size = rows.unflatten(1, (-1, width)).abs()
            level = size.amax(2, keepdim=True)
            if not ((size == 0) | (size == level)).all():
                break
        else:
            return Coded(values_OI.sign().to(torch.int8), level[..., 0])
    return None


def named(names: list[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def counted(names: list[str], noun: str) -> str:
    """How many there are: `1 tensor`, `3 tensors`."""
    if len(names) == 1:
        return f"1 {noun}"
    return f"{len(names)} {noun[:-1] + 'ices' if noun == 'matrix' else noun + 's'}"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
