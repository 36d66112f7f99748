"""Read GGUF files: the header, and tensors by range.

The format is llama.cpp's (github.com/ggml-org/ggml, `docs/gguf.md`). The `gguf` package maps a whole file into memory
and knows neither Q2_0 nor damaged files; here every number is checked against the size of the file before it is used.
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.pointers import pointer_problem
from launcher.checkpoint.tensor_file import TensorFileError, range_reader
from launcher.errors import ConfigError
from quant.gguf import BLOCK_BYTES, BLOCK_WIDTHS, Q2_0_TYPE

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""Kinds of values, as numpy names them."""
MAX_DIMENSIONS, MAX_DEPTH, MAX_ALIGNMENT = 4, 4, 2**20
READ_BYTES = 2**20
FORK_BLOCK_BYTES, FORK_BLOCK_WIDTH = 34, 128
"""A block of the type that a fork of llama.cpp calls Q2_0: a scale for 128 weights."""
FORK_PROBLEM = (
    "its tensors of type Q2_0 are a fork's, with blocks of 128 weights; llama.cpp has blocks of 64 under the same "
    "number and would read other weights. Convert the model with llama.cpp, or use the fork"
)
I2_S = 36
"""bitnet.cpp's own type."""


@dataclass(frozen=True)
class GGUFEntry:
    """The place of a tensor in a file."""

    type_number: int
    shape: tuple[int, ...]
    """Rows last but one, as elsewhere here; the file has it the other way around."""
    start: int
    """Its first byte, from the beginning of the file."""
    block_width: int
    """Weights of a block."""
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) // self.block_width * self.block_bytes


class GGUFFile:
    """A GGUF file, opened: its header has been read and checked, its tensors have not.

    Args:
        path: of the file, here or in a remote store.

    Raises:
        TensorFileError: it is no such file, or is damaged or cut off.
        ConfigError: the `gguf` package is missing.
    """

    def __init__(self, path: Path) -> None:
        if problem := pointer_problem(path):
            raise TensorFileError(problem)
        self._read_bytes, self._size = range_reader(path), path.stat().st_size
        self._buffer, self._buffer_start, self._at = memoryview(b""), 0, 0
        if bytes(self._take(4)) != MAGIC:
            raise TensorFileError("is not a GGUF file: it does not begin with GGUF")
        if (version := self._number("u4")) not in VERSIONS:
            raise TensorFileError(f"has version {version} of GGUF; {' and '.join(map(str, VERSIONS))} are read")
        num_tensors, num_fields = self._number("u8"), self._number("u8")
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text()
            self.fields[key] = self._value(self._number("u4"))
        infos = [self._info() for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            raise TensorFileError(f"general.alignment is {alignment!r:.40}")
        base = -(-self._at // alignment) * alignment
        self.unknown_types: dict[str, int] = {}
        """Numbers of types that are not known, by tensor; these tensors are not in `entries`."""
        self.entries: dict[str, GGUFEntry] = {}
        for name, number, shape, offset in infos:
            if name in self.entries or name in self.unknown_types:
                raise TensorFileError(f"holds {name} twice")
            block = _block(number)
            if block is None:
                self.unknown_types[name] = number
                continue
            if shape[-1] % block[0]:
                raise TensorFileError(f"{name} has rows of {shape[-1]}, which blocks of {block[0]} do not divide")
            self.entries[name] = GGUFEntry(number, shape, base + offset, *block)
        if self._is_of_fork():
            raise TensorFileError(FORK_PROBLEM)
        for name, entry in self.entries.items():
            if entry.start + entry.num_bytes > self._size:
                raise TensorFileError(
                    f"is cut off: {name} ends at byte {entry.start + entry.num_bytes}, and the file has {self._size}"
                )

    def _is_of_fork(self) -> bool:
        """Return whether its tensors of type Q2_0 have just the room that a fork's blocks of 128 take."""
        starts = sorted(entry.start for entry in self.entries.values())
        ends = dict(pairwise([*starts, self._size]))
        return any(
            ends[entry.start] - entry.start < entry.num_bytes
            and ends[entry.start] - entry.start >= math.prod(entry.shape) // FORK_BLOCK_WIDTH * FORK_BLOCK_BYTES
            for entry in self.entries.values()
            if entry.type_number == Q2_0_TYPE
        )

    def read(self, name: str) -> Tensor:
        """A tensor's values, fp32."""
        entry = self.entries[name]
        data = np.frombuffer(self._read_bytes(entry.start, entry.num_bytes), np.uint8)
        if entry.type_number == Q2_0_TYPE:
            blocks = torch.from_numpy(data).view(-1, entry.block_bytes)
            return _from_q2_0(blocks).view(entry.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = data.reshape(-1, entry.shape[-1] // entry.block_width * entry.block_bytes)
        stored = rows.view({0: np.float32, 1: np.float16}.get(entry.type_number, np.uint8))
        try:
            with np.errstate(all="ignore"):
                values = dequantize(stored, GGMLQuantizationType(entry.type_number))
        except NotImplementedError as error:
            raise TensorFileError(f"{name} is of type {entry.type_number}, which is not read") from error
        return torch.from_numpy(np.array(values, np.float32)).view(entry.shape)

    def _take(self, length: int) -> memoryview:
        """The next bytes of the header."""
        if length > self._size - self._at:
            raise TensorFileError(f"is cut off, or damaged: its header does not end within its {self._size} bytes")
        at = self._at - self._buffer_start
        if at + length > len(self._buffer):
            self._buffer_start, at = self._at, 0
            self._buffer = self._read_bytes(self._at, min(max(length, READ_BYTES), self._size - self._at))
        self._at += length
        return self._buffer[at : at + length]

    def _number(self, kind: str) -> Any:
        return np.frombuffer(self._take(np.dtype(kind).itemsize), f"<{kind}")[0].item()

    def _text(self) -> str:
        (length,) = struct.unpack("<Q", self._take(8))
        return bytes(self._take(length)).decode(errors="replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY and depth < MAX_DEPTH:
            of, length = self._number("u4"), self._number("u8")
            if of in SCALARS:
                values = self._take(length * np.dtype(SCALARS[of]).itemsize)
                return np.frombuffer(values, f"<{SCALARS[of]}").tolist()
            return [self._value(of, depth + 1) for _ in range(length)]
        if kind not in SCALARS:
            raise TensorFileError(f"is damaged: its header has a value of kind {kind}")
        if SCALARS[kind] == "f4":  # as it was written before it became one: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(self._number("f4"))))
        return self._number(SCALARS[kind])

    def _info(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._text(), self._number("u4")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise TensorFileError(f"is damaged: {name!r:.80} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("u8") for _ in range(dimensions)]))
        number, offset = self._number("u4"), self._number("u8")
        if min(shape) < 1 or max(math.prod(shape), offset) >= 2**60:
            raise TensorFileError(f"is damaged: {name!r:.80} has shape {shape} at {offset}")
        return name, number, shape, offset


def _block(number: int) -> tuple[int, int] | None:
    """Weights and bytes of a block of a type; None if the type is not known."""
    if number == Q2_0_TYPE:
        return BLOCK_WIDTHS["q2_0"], BLOCK_BYTES["q2_0"]
    if number == I2_S:  # llama.cpp had another type of this number
        return None
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ConfigError("GGUF files need the `gguf` package: pip install -e '.[gguf]'") from error
    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    except (ValueError, KeyError):
        return None


def _from_q2_0(blocks: Tensor) -> Tensor:
    from quant.codes import unpack_neighbors

    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return (unpack_neighbors(blocks[:, 2:]).float() - 1) * scale
