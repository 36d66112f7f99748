"""Safetensors files written in one pass, read by range, and proof against silent damage.

The format is Hugging Face's (github.com/huggingface/safetensors): the length of the header in 8 bytes, little-endian;
the header, JSON; the tensors' bytes. Any safetensors reader opens such a file. Two things are added. The last tensor,
`digests`, holds 16 bytes (XXH3-128) for each tensor before it. And the file's `root`, kept elsewhere, is the digest of
the header and of `digests`: whoever has the root can tell a damaged tensor from a sound one without reading the rest.

Files are read with plain reads at an offset, not by mapping: a mapped file counts as the process's memory, and a file
in a remote store cannot be mapped.
"""

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from data.pointers import pointer_problem

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


NAMES = {dtype: name for name, dtype in DTYPES.items()}


DIGESTS = "digests"


DIGEST_BYTES = 16


MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


MAX_DIMENSIONS = 64


CHUNK_BYTES = 16 * 2**20
"""How much is read at once where a whole tensor need not be in memory."""


def is_count(value: object) -> bool:
    """Return whether a value from JSON is a non-negative integer below 2^63."""
    return type(value) is int and 0 <= value < 2**63


class TensorFileError(ValueError):
    """A file is invalid; the message says why, and the caller adds the path."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= 500 else f"{text[:500]}...")  # a header may hold names of any length


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte, from the beginning of the file."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.start + self.num_elements * self.dtype.itemsize


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    file: BinaryIO,
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    values: Iterable[Iterable[Tensor]],
    metadata: dict[str, str],
    *,
    with_digests: bool = True,
) -> str:
    """Write a file from its beginning to its end.

    Args:
        file: open for writing; need not be able to seek.
        entries: name, dtype and shape of each tensor.
        values: for each entry, in their order, contiguous CPU tensors whose bytes, one after the other, are its own.
            They are asked for when they are written, so that one need be in memory at a time.
        metadata: goes into the header.
        with_digests: whether the file gets its tensor `digests`; programs that expect certain tensors want no other.

    Returns:
        The root, in hexadecimal; to read the file with, if it has digests.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    last = [(DIGESTS, torch.uint8, (len(entries), DIGEST_BYTES))] if with_digests else []
    for name, dtype, shape in [*entries, *last]:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    digests = []
    for (name, dtype, shape), pieces in zip(entries, values, strict=True):
        digest, num_bytes = xxhash.xxh3_128(), 0
        for piece in pieces:
            view = byte_view(piece)
            digest.update(view)
            file.write(view)
            num_bytes += len(view)
        assert num_bytes == math.prod(shape) * dtype.itemsize, name
        digests.append(digest.digest())
    if with_digests:
        file.write(b"".join(digests))
    return _root(text, b"".join(digests))


def _root(header: bytes, digests: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(header + digests))


class TensorFile:
    """A safetensors file, opened: its header has been read and checked, its tensors have not.

    Args:
        path: of the file; a `pathlib.Path`, or a `upath.UPath` into a remote store.
        root: what `write_tensors` returned; None for files that others wrote, which have no digests.

    Raises:
        TensorFileError: this is no such file, or its header or digests are damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, root: str | None = None) -> None:
        self._read_bytes = range_reader(path)
        size = path.stat().st_size
        if problem := pointer_problem(path):
            raise TensorFileError(problem)
        if size < 8:
            raise TensorFileError(f"has {size} bytes and cannot be a safetensors file")
        (length,) = struct.unpack("<Q", self._read_bytes(0, 8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise TensorFileError(f"is not a safetensors file, or is cut off: the header has {length} of {size} bytes")
        text = bytes(self._read_bytes(8, length))
        self.entries, self.metadata = _parse_header(text, size)
        self._digests: dict[str, bytes] = {}
        if root is not None:
            digests = self._bytes_of(DIGESTS) if DIGESTS in self.entries else b""
            if _root(text, digests) != root:
                raise TensorFileError("its header is damaged: it does not have the digest that the manifest says")
            names = [name for name in self.entries if name != DIGESTS]
            if len(digests) != DIGEST_BYTES * len(names):
                raise TensorFileError(f"has {len(digests)} bytes of digests for {len(names)} tensors")
            cut = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
            self._digests = dict(zip(names, cut, strict=True))

    def _bytes_of(self, name: str) -> bytes:
        entry = self.entries[name]
        return bytes(self._read_bytes(entry.start, entry.end - entry.start))

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements ``start`` up to ``start + length`` of a flattened tensor, in the dtype it is stored in."""
        entry = self.entries[name]
        length = entry.num_elements - start if length is None else length
        if not 0 <= start <= start + length <= entry.num_elements:
            raise TensorFileError(f"{name} holds {entry.num_elements} elements, not {start + length}")
        if not length:
            return torch.empty(0, dtype=entry.dtype)
        size = entry.dtype.itemsize
        data = self._read_bytes(entry.start + start * size, length * size)
        return torch.frombuffer(data, dtype=entry.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor that has a digest."""
        return {name: self.entries[name].end - self.entries[name].start for name in self._digests}

    def damaged(self, names: Collection[str] | None = None) -> Iterator[str]:
        """Read tensors, by default all; yield the names of damaged ones."""
        chunk = memoryview(bytearray(CHUNK_BYTES))
        for name in self._digests if names is None else names:
            expected = self._digests[name]
            entry, digest = self.entries[name], xxhash.xxh3_128()
            for start in range(entry.start, entry.end, CHUNK_BYTES):
                length = min(CHUNK_BYTES, entry.end - start)
                digest.update(self._read_bytes(start, length, chunk[:length]))
            if digest.digest() != expected:
                yield name


def range_reader(path: Path) -> Callable[..., memoryview]:
    """A function ``(start, length)`` that reads bytes of a file, here or in a remote store, into memory of their own.

    With a third argument, a memoryview of that length, it reads into that.

    The function raises TensorFileError where the file ends before.
    """
    if not isinstance(path, Path):

        def read_remote(start: int, length: int, into: memoryview | None = None) -> memoryview:
            data = path.fs.cat_file(path.path, start=start, end=start + length) if length else b""
            view = _whole(memoryview(bytearray(data)), length)
            if into is None:
                return view
            into[:] = view
            return into

        return read_remote

    def read_local(start: int, length: int, into: memoryview | None = None) -> memoryview:
        # A bytearray would be cleared first.
        view, filled = np.empty(length, np.uint8).data if into is None else into, 0
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while filled < length and (count := file.readinto(view[filled:])):
                filled += count
        return _whole(view[:filled], length)

    return read_local


def _whole(data: memoryview, length: int) -> memoryview:
    if len(data) != length:
        raise TensorFileError("ends too early: it is cut off")
    return data


def _parse_header(text: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check a header as strictly as the format says: no overlap, no gap, nothing after the last tensor."""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        base = 8 + len(text)
        entries, ends = {}, {}
        for name, about in header.items():
            start, ends[name] = about["data_offsets"]
            entries[name] = Entry(DTYPES[about["dtype"]], tuple(about["shape"]), base + start)
            numbers = [*about["shape"][:MAX_DIMENSIONS], start, ends[name]]
            if len(about["shape"]) > MAX_DIMENSIONS or not all(map(is_count, numbers)):
                raise TensorFileError(f"its header does not say where {name!r} is")
        position = base
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if (entry.start, entry.end) != (position, base + ends[name]):
                raise TensorFileError(f"its header does not say where {name!r} is")
            position = entry.end
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TensorFileError("its header's __metadata__ holds values that are not text")
    except TensorFileError:
        raise
    except KeyError as error:
        raise TensorFileError(f"its header has no or an unknown {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"its header is damaged: {error}") from error
    if position != size:
        raise TensorFileError(f"has {size} bytes instead of {position}")
    return entries, metadata
