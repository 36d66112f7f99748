"""Tensor files: other programs read them and we read theirs; every value comes back, and no damage goes unnoticed."""

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.checkpoint import tensor_file
from launcher.checkpoint.tensor_file import DIGEST_BYTES, DIGESTS, DTYPES, TensorFile, TensorFileError, write_tensors

ROUND_TRIP = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, with_digests: bool = True
) -> str:
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        values = ([tensor] for tensor in tensors.values())
        return write_tensors(file, entries, values, metadata or {}, with_digests=with_digests)


def of_bytes(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of random bytes: with every NaN and every negative zero that the dtype has."""
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if dtype == torch.bool:
        return torch.tensor([byte & 1 for byte in data], dtype=torch.bool).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor; NaNs equal nothing, not even themselves."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda name: name not in (DIGESTS, "__metadata__")
)
some_tensors = st.dictionaries(
    names, st.builds(of_bytes, st.integers(0, 2**32), st.sampled_from(list(DTYPES.values())), shapes), max_size=6
)


@ROUND_TRIP
@given(tensors=some_tensors, metadata=st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]))))
def test_what_is_written_is_read_here_and_by_the_safetensors_library(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path / "file.safetensors"
    root = write(path, tensors, metadata)
    ours, theirs = TensorFile(path, root), load_file(path)
    assert list(ours.damaged()) == []
    assert ours.metadata == {"format": "pt", **metadata}
    assert set(ours.entries) == set(theirs) == {*tensors, DIGESTS}
    assert tuple(theirs[DIGESTS].shape) == (len(tensors), DIGEST_BYTES)
    for name, tensor in tensors.items():
        assert (ours.entries[name].dtype, ours.entries[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert bits(ours.read(name)) == bits(tensor)
        assert ours.read(name).dtype == tensor.dtype
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(theirs[name]) == bits(tensor)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == ours.metadata


@ROUND_TRIP
@given(tensors=some_tensors)
def test_files_of_the_safetensors_library_are_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata={"of": "others"})
    file = TensorFile(path)
    assert file.metadata == {"of": "others"}
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert (file.entries[name].dtype, file.entries[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert bits(file.read(name)) == bits(tensor)


@ROUND_TRIP
@given(tensors=some_tensors)
def test_without_digests_a_file_has_the_tensors_that_were_given_and_no_other(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "file.safetensors"
    write(path, tensors, with_digests=False)
    assert load_file(path).keys() == tensors.keys()
    assert list(TensorFile(path).damaged()) == []  # nothing is known of its tensors


@ROUND_TRIP
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES.values())), length=st.integers(0, 50))
def test_any_range_can_be_read(tmp_path: Path, data: st.DataObject, dtype: torch.dtype, length: int) -> None:
    tensors = {"before": torch.ones(3), "a": of_bytes(length, dtype, (length,)), "behind": torch.ones(3)}
    root = write(tmp_path / "file", tensors)
    file = TensorFile(tmp_path / "file", root)
    start = data.draw(st.integers(0, length))
    count = data.draw(st.integers(0, length - start))
    assert bits(file.read("a", start, count)) == bits(tensors["a"][start : start + count])
    assert bits(file.read("a", start)) == bits(tensors["a"][start:])
    for beyond in ((start, length - start + 1), (-1, 1), (length + 1, None)):
        with pytest.raises(TensorFileError, match=f"a holds {length} elements"):
            file.read("a", *beyond)


def test_pieces_are_asked_for_one_at_a_time_and_become_one_tensor(tmp_path: Path) -> None:
    asked = []

    def pieces(name: str) -> Iterator[Tensor]:
        for number in range(3):
            asked.append((name, number))
            yield torch.full((2, 2), float(number))

    buffer = io.BytesIO()
    buffer.seekable = lambda: False  # type: ignore[method-assign]
    entries = [(name, torch.float32, (12,)) for name in ("a", "b")]
    root = write_tensors(buffer, entries, (pieces(name) for name in ("a", "b")), {})
    assert asked == [(name, number) for name in ("a", "b") for number in range(3)]
    (tmp_path / "file").write_bytes(buffer.getvalue())
    file = TensorFile(tmp_path / "file", root)
    assert file.read("b").tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_tensors_are_read_in_chunks_to_find_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 7)
    tensors = {"a": torch.arange(100.0), "b": torch.arange(3)}
    root = write(tmp_path / "file", tensors)
    file = TensorFile(tmp_path / "file", root)
    assert list(file.damaged()) == []
    flip(tmp_path / "file", file.entries["a"].end - 1, 0)
    assert list(file.damaged()) == ["a"]


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_every_bit_of_a_file_counts_and_damage_has_a_name(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b/ü": torch.tensor(True), "empty": torch.empty(0, 2), "c": torch.arange(2)}
    path = tmp_path / "file"
    root = write(path, tensors, {"ranges": "{}"})
    sound = path.read_bytes()
    entries = TensorFile(path, root).entries
    for offset in range(len(sound)):
        for bit in (0, 5, 7):  # 5 makes another letter case of it
            flip(path, offset, bit)
            held = [name for name, entry in entries.items() if entry.start <= offset < entry.end and name != DIGESTS]
            if held:
                assert list(TensorFile(path, root).damaged()) == held
            else:
                with pytest.raises(TensorFileError):
                    TensorFile(path, root)
            path.write_bytes(sound)


@pytest.mark.parametrize("with_root", [True, False])
def test_a_file_that_is_cut_or_has_more_is_refused(tmp_path: Path, with_root: bool) -> None:
    path = tmp_path / "file"
    root = write(path, {"a": torch.randn(3), "b": torch.arange(2)})
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(TensorFileError):
            TensorFile(path, root if with_root else None)
    path.write_bytes(sound + b"\0")
    with pytest.raises(TensorFileError):
        TensorFile(path, root if with_root else None)


def test_a_file_that_is_cut_after_it_was_opened_is_not_read_short(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = TensorFile(path, write(path, {"a": torch.randn(3)}))
    path.write_bytes(path.read_bytes()[: file.entries["a"].end - 1])
    with pytest.raises(TensorFileError, match="cut off"):
        file.read("a")


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": A, "b": B | {"data_offsets": [4, 8]}}, "where 'b' is"),  # overlap
        ({"a": A | {"data_offsets": [4, 12]}}, "where 'a' is"),  # hole
        ({"a": A, "b": B | {"shape": [5]}}, "where 'b' is"),
        ({"a": A | {"shape": [-1, -2]}, "b": B}, "where 'a' is"),
        ({"a": A | {"shape": [2.0]}, "b": B}, "where 'a' is"),
        ({"a": A | {"shape": [True, 2]}, "b": B}, "where 'a' is"),
        ({"a": A | {"data_offsets": [0.0, 8.0]}, "b": B}, "where 'a' is"),
        ({"a": A | {"data_offsets": [0, 8, 12]}, "b": B}, "damaged"),
        ({"a": A | {"dtype": "Q3"}, "b": B}, "unknown 'Q3'"),
        ({"a": {"dtype": "F32", "shape": [2]}, "b": B}, "no or an unknown 'data_offsets'"),
        ({"a": A | {"shape": 2}, "b": B}, "damaged"),
        ({"a": A | {"shape": ["2"]}, "b": B}, "where 'a' is"),
        ({"a": A | {"data_offsets": [None, 8]}, "b": B}, "damaged"),
        ({"a": A | {"data_offsets": []}, "b": B}, "damaged"),
        ({"a": A | {"shape": [2**62, 2**62]}, "b": B}, "where 'a' is"),
        ({"a": 3, "b": B}, "damaged"),
        ({"a": A, "b": B, "__metadata__": {"format": 1}}, "__metadata__ holds something else"),
        ({"a": A, "b": B, "__metadata__": []}, "damaged"),
        ([A, B], "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"a": NaN}', "damaged"),
        ('{"a"', "damaged"),
        ({"a": A}, "bytes instead of"),  # four bytes belong to nothing
    ],
)
def test_a_malformed_header_is_refused_in_a_sentence(tmp_path: Path, header: object, says: str) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(TensorFileError, match=says):
        TensorFile(tmp_path / "file")


def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(TensorFileError, match="is cut off"):
        TensorFile(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TensorFileError, match="has 0 bytes"):
        TensorFile(tmp_path / "file")


def test_another_root_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "a", {"a": torch.zeros(2)})
    other = write(tmp_path / "b", {"a": torch.ones(2)})
    assert root != other
    with pytest.raises(TensorFileError, match="digest"):
        TensorFile(tmp_path / "a", other)
    write(tmp_path / "c", {"a": torch.zeros(2)}, with_digests=False)
    with pytest.raises(TensorFileError, match="digest"):
        TensorFile(tmp_path / "c", root)
