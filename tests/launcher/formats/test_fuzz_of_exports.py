"""Exports that were damaged, or that lie: each is refused in a sentence, or read.

Nothing takes gigabytes or hangs, whatever a count in a header claims. Mutants are drawn with a seed.
"""

import json
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_folders import model_of, write
from exports import exportable
from gguf_files import SCALARS, narrow, random_model
from limits import limited

from data.errors import DataError
from launcher.commands.verify import published_in
from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.open import open_source
from launcher.inference.load import load_model
from launcher.inference.verdict import judge
from quant.config import QuantConfig

NUMBERS = (0, 1, 2, 3, 7, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
MESSAGE_CHARACTERS = 3000


def read_all(place: Path) -> str:
    """What `verify`, `convert` and loading do with an export; returns what came of it."""
    with limited():
        problems = [problem for each in published_in(place) for problem in judge(each).problems]
        assert all(len(problem) < MESSAGE_CHARACTERS for problem in problems)
        try:
            source = open_source(str(place))
            for name, shape in source.shapes.items():
                source.read("weight", name, 0, torch.Size(shape).numel())
            load_model(place)
        except (CheckpointError, DataError) as error:
            refusal = str(error)
        else:
            return "read with problems" if problems else "read"
    assert str(place) in refusal
    assert len(refusal) < MESSAGE_CHARACTERS
    return "refused"


def attacked(mutants: Iterator[bytes], place: Path, file: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for content in mutants:
        file.write_bytes(content)
        outcomes[read_all(place)] += 1
    print(f"{outcomes.total()} mutants: {dict(outcomes)}")  # noqa: T201
    return outcomes


def changed_bytes(whole: bytes, header: int, count: int, seed: int = 0) -> Iterator[bytes]:
    """Files that are cut, or with bits or bytes changed, most of them in the header."""
    draw = random.Random(seed)
    for _ in range(count):
        content = bytearray(whole)
        at = draw.randrange(header) if draw.random() < 0.85 else draw.randrange(len(whole))
        kind = draw.choice(["cut", "flip", "flip", "byte", "number", "insert", "remove", "repeat"])
        if kind == "cut":
            del content[at:]
        elif kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            content[at] = draw.choice((0, 1, 9, 42, 127, 255))
        elif kind == "number":
            content[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
        elif kind == "insert":
            content[at:at] = draw.randbytes(draw.randrange(1, 40))
        elif kind == "remove":
            del content[at : at + draw.randrange(1, 40)]
        else:
            content[at:at] = content[at : at + draw.randrange(1, 400)]
        yield bytes(content)


def numbers_of(content: bytes) -> list[tuple[int, str]]:
    """The place and the kind of every number in the header of a GGUF file: counts, lengths, kinds, values, shapes."""
    found, at = [(4, "I"), (8, "Q"), (16, "Q")], 24

    def number(kind: str) -> Any:
        nonlocal at
        found.append((at, kind))
        (value,) = struct.unpack_from(f"<{kind}", content, at)
        at += struct.calcsize(kind)
        return value

    def text() -> None:
        nonlocal at
        length = number("Q")
        at += length

    def value(kind: int) -> None:
        if kind == 9:
            of, length = number("I"), number("Q")
            for _ in range(length):
                value(of)
        elif kind == 8:
            text()
        else:
            number(SCALARS[kind])

    num_tensors, num_fields = struct.unpack_from("<QQ", content, 8)
    for _ in range(num_fields):
        text()
        value(number("I"))
    for _ in range(num_tensors):
        text()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    return [*found, (at, "")]


def lying_numbers(whole: bytes, count: int, seed: int = 1) -> Iterator[bytes]:
    """Files in which one number of the header is another, most of them not one of the vocabulary."""
    draw, (*numbers, (end, _)) = random.Random(seed), numbers_of(whole)
    few = [each for each in numbers if not 1500 < each[0] < end - 1500]
    for _ in range(count):
        content, (at, kind) = bytearray(whole), draw.choice(few if draw.random() < 0.8 else numbers)
        size = struct.calcsize(kind)
        value = draw.choice(NUMBERS) % 2 ** (8 * size)
        content[at : at + size] = value.to_bytes(size, "little")
        yield bytes(content)


@pytest.fixture(scope="module")
def gguf_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    model = random_model(
        narrow(max_sequence_length=64, hidden_size=64, intermediate_size=64, num_heads=2, num_kv_heads=1)
    )
    export_gguf(exportable(model), path, into="q2_0", tokenizer=shards / "tokenizer.model")
    assert read_all(path) == "read"
    return path


def share(some: int, many: int) -> Any:
    return pytest.mark.parametrize("count", [some, pytest.param(many, marks=pytest.mark.slow)])


@share(50, 3000)
def test_bytes_of_gguf_files(gguf_file: Path, tmp_path: Path, count: int) -> None:
    whole = gguf_file.read_bytes()
    header = numbers_of(whole)[-1][0]
    place = tmp_path / "mutant.gguf"
    outcomes = attacked(changed_bytes(whole, header, count), place, place)
    assert outcomes["refused"] > count / 5


@share(40, 3000)
def test_numbers_of_gguf_headers(gguf_file: Path, tmp_path: Path, count: int) -> None:
    place = tmp_path / "mutant.gguf"
    outcomes = attacked(lying_numbers(gguf_file.read_bytes(), count), place, place)
    assert outcomes["refused"] > count / 5


def test_a_vocabulary_whose_unknown_token_ends_texts(gguf_file: Path, tmp_path: Path) -> None:
    """SentencePiece cannot open such a model."""
    content = gguf_file.read_bytes()
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    place = tmp_path / "mutant.gguf"
    place.write_bytes(content.replace(key + struct.pack("<I", 2), key + struct.pack("<I", 0)))
    assert load_model(place).tokenizer is None


def test_an_empty_tensor_of_many_rows(gguf_file: Path, tmp_path: Path) -> None:
    content = bytearray(gguf_file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4
    content[at : at + 16] = struct.pack("<QQ", 0, 2**63)
    place = tmp_path / "mutant.gguf"
    place.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' has shape \(9223372036854775808, 0\)"):
        open_source(str(place))


FILES = {
    "compressed-tensors": ("model.safetensors", "config.json"),
    "mlx": ("model.safetensors", "config.json"),
    "onnx": ("model.onnx", "config.json"),
    "packed": ("model.safetensors", "config.json"),
}


@share(25, 1000)
@pytest.mark.parametrize(("weights", "name"), [(weights, name) for weights, names in FILES.items() for name in names])
def test_bytes_of_folders(tmp_path: Path, weights: str, name: str, count: int) -> None:
    folder = tmp_path / "out"
    write(model_of("llama", num_layers=1, max_sequence_length=64), QuantConfig(), folder, weights)
    whole = (folder / name).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0] if name == "model.safetensors" else len(whole)
    attacked(changed_bytes(whole, header, count), folder, folder / name)


@pytest.mark.parametrize(
    "weights",
    ["compressed-tensors", "packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlx", "onnx"))],
)
def test_configurations_that_lie(tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "out"
    write(model_of("llama", num_layers=1, max_sequence_length=64), QuantConfig(), folder, weights)
    config = json.loads((folder / "config.json").read_text())
    draw = random.Random(2)

    def mutants() -> Iterator[bytes]:
        values: list[Any] = [None, -1, 0, 0.5, "x", [], {}, True, [[]], *NUMBERS]
        for key in config:
            for value in draw.sample(values, 2):
                yield json.dumps(config | {key: value}).encode()

    attacked(mutants(), folder, folder / "config.json")
