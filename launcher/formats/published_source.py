"""Exports of other formats as sources: folders for compressed-tensors, MLX and ONNX Runtime, and GGUF files.

They are opened by `launcher.formats.published`, which collects what is wrong. Here any of it is an error. Opening reads
every matrix of codes once: what is no code is found before anything is computed, and the granularity of the scales
follows from the scales themselves.
"""

import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import DataError
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.source import Source
from launcher.errors import CheckpointError
from launcher.formats.hf_source import NOT_IN_CODES, listed, weights_alone
from launcher.formats.published import Coded, Published
from model.size import parameter_shapes
from quant.codes import CODES_PER_BYTE, pack
from quant.config import BITNET, QuantConfig


class PublishedSource(Source):
    """A model in another program's format, opened and checked.

    Args:
        published: the folder or file.

    Raises:
        CheckpointError: the architecture is not known, or anything is wrong with the file or its codes.
    """

    has_moments = False

    def __init__(self, published: Published) -> None:
        self.location, self._published = published.location, published
        self.puts_first_token, self.stored_dtypes = published.puts_first_token, published.stored_dtypes
        config, problems = published.config, list(published.problems)
        if config is None:
            problems = problems or list(published.notes)
        elif not problems and (problem := published.tied_problem()):
            problems = [problem]
        if problems:
            raise CheckpointError(listed(f"{self.location} cannot be read", problems))
        assert config is not None
        self.model_config, self.shapes = config, parameter_shapes(config)
        self._read: tuple[str, Tensor] | None = None
        """The parameter that was read last: pieces of it follow one another."""
        levels = {name: self._level(name) for name in self.shapes if published.is_coded(name)}
        self._levels = {name: level for name, level in levels.items() if level is not None}
        self.is_packed = bool(self._levels)
        self.precision = Precision.in_16_bits(config.num_layers)
        form = published.form.partition(",")[0]
        self.missing = weights_alone(form)
        if self.is_packed:
            self.precision = Precision.full(self._recipe(), config.num_layers)
            self.missing += (NOT_IN_CODES.format(form),)

    @property
    def first_token(self) -> int | None:
        return self._published.first_token

    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file on this machine; None if there is none, or none that is read."""
        with suppress(DataError):
            return self._published.tokenizer_file()
        return None

    def _level(self, name: str) -> Tensor | None:
        """The level of a matrix with as few numbers as say it; None if it is not stored as ternary codes."""
        weights = self._published.read(name)
        if not isinstance(weights, Coded):
            return None
        codes_OI, level = weights
        if not codes_OI.abs().le(1).all():
            raise CheckpointError(f"{self.location}: {name} holds codes other than -1, 0 and +1")
        for each in (1, 0):  # blocks of zeros may have no level of their own: that of their row, or of the matrix
            level = torch.where(level == 0, level.amax(each, keepdim=True), level)
        if not (level.isfinite() & (level > 0)).all():
            raise CheckpointError(f"{self.location}: the scales of {name} must be positive numbers")
        level = level[:, :1] if torch.equal(level, level[:, :1].expand_as(level)) else level
        return level[:1] if torch.equal(level, level[:1].expand_as(level)) else level

    def _recipe(self) -> QuantConfig:
        """The quantization that computes with these codes, and rounds inputs as the format's programs do."""
        widths = [self.shapes[name][1] // level.shape[1] for name, level in self._levels.items() if level.shape[1] > 1]
        include = "|".join(f"^{re.escape(name.removesuffix('.weight'))}$" for name in self._levels)
        recipe = replace(BITNET, include=include, activations=self._published.inputs)
        if widths:
            return replace(recipe, granularity="group", group_size=math.gcd(*widths))
        rows = any(len(level) > 1 for level in self._levels.values())
        return replace(recipe, granularity="row") if rows else recipe

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        if kind != "weight":
            raise CheckpointError(f"{self.location}: holds no {kind}")
        if self._read is None or self._read[0] != name:
            weights = self._published.read(name)
            values = weights.values() if isinstance(weights, Coded) else weights
            if tuple(values.shape) != (shape := self.stored_shape(name)):
                raise CheckpointError(f"{self.location}: {name} is {tuple(values.shape)}, not {shape}")
            self._read = name, values.flatten()
        values = self._read[1]
        if start + length > len(values):
            raise CheckpointError(f"{self.location}: {name} holds {len(values)} elements, not {start + length}")
        return values[start : start + length].clone()

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        weights = self._published.read(name)
        assert isinstance(weights, Coded), name
        padding = -len(weights.codes) % CODES_PER_BYTE
        return pack(F.pad(weights.codes, (0, 0, 0, padding))), self._in_granularity(name)

    def _in_granularity(self, name: str) -> Tensor:
        level, recipe = self._levels[name], self.precision.quantization
        assert recipe is not None
        O, I = self.shapes[name]  # noqa: E741
        if recipe.granularity == "matrix":
            return level
        groups = I // recipe.group_size if recipe.granularity == "group" else 1
        return level.repeat_interleave(groups // level.shape[1], 1).expand(O, -1).contiguous()

    def read_step(self, name: str) -> float:
        raise CheckpointError(f"{self.location}: holds no optimizer state")
