"""Token files of Megatron and datatrove become the rows that their texts would have become."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_corpus

from data.config import PrepareConfig
from data.documents import Document
from data.errors import DataError
from data.prepared import open_prepared
from data.shards import prepare
from data.survey import survey
from data.task import listings, stats_of, task_of
from data.tokenizer import load_tokenizer, train_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A folder with a text and its tokenizer, and the tokens of each document."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus = write_corpus(folder / "a.jsonl", num_documents=40)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    train_tokenizer(texts, "bpe:300", folder / "t.model")
    return folder, load_tokenizer(folder / "t.model").encode_batch(texts)


def write_megatron(path: Path, documents: list[list[int]], dtype: type = np.uint16, code: int = 8) -> None:
    """As `IndexedDatasetBuilder` of Megatron-LM writes it: one sequence for each document."""
    path.with_suffix(".bin").write_bytes(np.concatenate([np.array(each, dtype) for each in documents]).tobytes())
    lengths = np.array(list(map(len, documents)), np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64) * np.dtype(dtype).itemsize)[:-1]])
    with path.open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code]))
        file.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        file.write(lengths.tobytes() + offsets.astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def write_datatrove(path: Path, documents: list[list[int]], size: int = 2) -> None:
    """As `TokenizedFile` of datatrove writes it."""
    dtype = {2: np.uint16, 4: np.uint32}[size]
    path.write_bytes(np.concatenate([np.array(each, dtype) for each in documents]).tobytes())
    ends = np.cumsum(list(map(len, documents)))
    path.with_name(f"{path.name}.index").write_bytes(ends.astype(np.uint64).tobytes())
    path.with_name(f"{path.name}.metadata").write_text(f"name/of-tokenizer|{size}\n{ends[-1]}\n9 T")


def folder_of(source: Path, made, out: Path, **options) -> dict:
    config = PrepareConfig(inputs=(str(source),), tokenizer=str(made[0] / "t.model"), **options)
    prepare(config, LENGTH, out)
    return {
        name: (out / name).read_bytes() for name in ("train/shard.00000.mds", "train/index.json", "token_bytes.npy")
    }


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
@pytest.mark.parametrize("appends_end", [False, True])
def test_the_rows_are_those_of_the_text(made, tmp_path, packing, appends_end):
    folder, documents = made
    expected = folder_of(folder / "a.jsonl", made, tmp_path / "text", packing=packing)
    end = load_tokenizer(folder / "t.model").end_of_document
    stored = [[*each, end] if appends_end else each for each in documents]
    stored[3:3] = [[], [end], [end]]  # documents with nothing in them
    write_megatron(tmp_path / "m.idx", stored)
    write_datatrove(tmp_path / "d.ds", stored, size=4)
    for name in ("m.idx", "d.ds"):
        out = tmp_path / f"out-{name}"
        assert folder_of(tmp_path / name, made, out, packing=packing, workers=1) == expected
        facts, of_text = open_prepared(out)["splits"]["train"], open_prepared(tmp_path / "text")["splits"]["train"]
        assert facts == of_text
        assert open_prepared(out)["compared_documents"] == 0


def test_wide_tokens_and_documents_of_several_sequences(made, tmp_path):
    folder, documents = made
    expected = folder_of(folder / "a.jsonl", made, tmp_path / "text")
    cut = [part for each in documents for part in (each[:5], each[5:])]
    write_megatron(tmp_path / "m.idx", cut, np.int32, 4)
    content = (tmp_path / "m.idx").read_bytes()
    places = np.arange(0, len(cut) + 1, 2, dtype=np.int64)
    head = content[:26] + len(places).to_bytes(8, "little")
    (tmp_path / "m.idx").write_bytes(head + content[34 : 34 + 12 * len(cut)] + places.tobytes())
    assert folder_of(tmp_path / "m.idx", made, tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["idx", "ds"])
def test_files_beside_an_index_that_change_are_noticed(made, tmp_path, kind):
    """A folder that is ready, or half made, is not taken for the one of other tokens."""
    _, documents = made
    source, options = tmp_path / f"m.{kind}", {"tokenizer": str(made[0] / "t.model")}
    write = write_megatron if kind == "idx" else write_datatrove
    write(source, documents)
    config = PrepareConfig(inputs=(str(source),), **options)
    prepare(config, LENGTH, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made_by = task_of(config, LENGTH, None).made_by
    prepare(config, LENGTH, tmp_path / "out")
    write(source, [[*each, 5] for each in documents])
    assert task_of(config, LENGTH, None).made_by["files"] != made_by["files"]
    with pytest.raises(DataError, match="had other files, or files of other sizes"):
        prepare(config, LENGTH, tmp_path / "out")

    found = survey([str(source)])
    manifest["listings"] = listings(found, stats_of(found), has_beside=False)  # of an earlier version
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepare(config, LENGTH, tmp_path / "out")


def test_tokens_alone_decide_whether_they_are_held_out():
    tokens = [5, 7, 300]
    kinds = (np.uint16, np.int32, np.uint32, np.int64)
    assert len({Document(np.array(tokens, kind), "a").uniform() for kind in kinds}) == 1


def test_other_vocabularies_are_refused(made, tmp_path):
    _, documents = made
    write_megatron(tmp_path / "m.idx", [*documents[:3], [5, 300], *documents[3:]])
    with pytest.raises(DataError, match=r"m.idx:4: holds token 300, but the tokenizer has 300 tokens; name the token"):
        folder_of(tmp_path / "m.idx", made, tmp_path / "out")
    write_megatron(tmp_path / "m.idx", [[5, -1]], np.int32, 4)
    with pytest.raises(DataError, match=r"m.idx:1: holds token -1"):
        folder_of(tmp_path / "m.idx", made, tmp_path / "out")
    write_megatron(tmp_path / "m.idx", [[5, 2, 7]])
    with pytest.raises(DataError, match=r"m.idx:1: holds token 2, which ends documents, in the middle"):
        folder_of(tmp_path / "m.idx", made, tmp_path / "out")
    with pytest.raises(DataError, match=r"m.idx: holds tokens, not text to train a tokenizer on"):
        prepare(PrepareConfig(inputs=(str(tmp_path / "m.idx"),), tokenizer="bpe:300"), LENGTH, tmp_path / "out")


def patched(path: Path, at: int, value: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: patched(path, 0, b"X"), "is not an index of Megatron's"),
        (lambda path: patched(path, 17, b"\x07"), "says that tokens have type 7"),
        (lambda path: patched(path, 18, b"\xff\xff\xff\xff"), "has .* bytes, not those of"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has .* bytes, not those of"),
        (lambda path: patched(path, 34, b"\xff\xff\xff\x7f"), "does not fit m.bin"),
        (lambda path: patched(path, 34, b"\xff\xff\xff\xff"), "does not fit m.bin"),
        (lambda path: path.with_suffix(".bin").unlink(), "m.bin: missing"),
        (lambda path: path.with_suffix(".bin").write_bytes(b"12"), "does not fit m.bin"),
    ],
)
def test_damaged_indexes_of_megatron_are_named(made, tmp_path, harm, message):
    write_megatron(tmp_path / "m.idx", made[1])
    harm(tmp_path / "m.idx")
    with pytest.raises(DataError, match=message):
        folder_of(tmp_path / "m.idx", made, tmp_path / "out")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.with_name("d.ds.index").unlink(), "d.ds.index: missing; datatrove writes it"),
        (lambda path: path.with_name("d.ds.metadata").write_text("name|3\n"), r"must end its first line with \|2 or"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "d.ds.index: does not fit"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no number of uint16 tokens"),
        (lambda path: patched(path.with_name("d.ds.index"), 0, b"\xff" * 7), "d.ds.index: does not fit"),
    ],
)
def test_damaged_files_of_datatrove_are_named(made, tmp_path, harm, message):
    write_datatrove(tmp_path / "d.ds", made[1])
    harm(tmp_path / "d.ds")
    with pytest.raises(DataError, match=message):
        folder_of(tmp_path / "d.ds", made, tmp_path / "out")
