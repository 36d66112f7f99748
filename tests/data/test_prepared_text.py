"""Prepared data as text again: every document but one that was cut, to the character."""

import json
import struct

import numpy as np
import pytest
from tiny import write_corpus
from tokenizer_zoo import LOSSLESS

from data import tokenizer_kinds, writers
from data.config import PrepareConfig
from data.errors import DataError
from data.prepared import MANIFEST, open_prepared
from data.readers import read_documents
from data.shards import prepare
from data.tokenizer import load_tokenizer

LENGTH = 32


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SHARD_BYTES", 5000)
    monkeypatch.setattr(tokenizer_kinds, "SEGMENT_CHARS", 300)
    path = write_corpus(tmp_path / "a.jsonl", num_documents=60)
    extra = [
        "  two  spaces\n\n",
        " starts with one",
        "\u2581 itself",
        "caf\u00e9 e\u0301 \U0001f600",
        "line\n" * 400,
        "x",
    ]
    with path.open("a") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in extra * 3)
    return path


def texts(*inputs):
    return [document.text for document in read_documents([str(each) for each in inputs])]


@pytest.mark.parametrize("name", ["bpe:320", "gpt2.json", "llama2.model"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_all_documents_come_back(corpus, tmp_path, name, compression):
    tokenizer = name
    if name in LOSSLESS:
        LOSSLESS[name](tmp_path / name)
        tokenizer = str(tmp_path / name)
    config = PrepareConfig(inputs=(str(corpus),), tokenizer=tokenizer, compression=compression)
    manifest = prepare(config, LENGTH, tmp_path / "old")
    before, after = texts(corpus), texts(tmp_path / "old" / "train")
    assert len(before) > len(after) >= len(before) - 1 - manifest["splits"]["train"]["dropped_tokens"]
    assert after == before[: len(after)]
    assert len(list((tmp_path / "old" / "train").iterdir())) > 4  # documents go over shards


def test_another_tokenizer_makes_what_it_makes_of_the_text(corpus, tmp_path):
    held = write_corpus(tmp_path / "held.jsonl", num_documents=30)
    old = PrepareConfig(inputs=(str(corpus),), validation_inputs=(str(held),), tokenizer="bpe:320")
    prepare(old, LENGTH, tmp_path / "old")
    for split, name in (("train", "train.jsonl"), ("validation", "held2.jsonl")):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(tmp_path / "old" / split)]
        (tmp_path / name).write_text("".join(lines))
    again = {
        "again": (str(tmp_path / "old/train"), str(tmp_path / "old/validation")),
        "text": (str(tmp_path / "train.jsonl"), str(tmp_path / "held2.jsonl")),
    }
    for out, (train, validation) in again.items():
        config = PrepareConfig(inputs=(train,), validation_inputs=(validation,), tokenizer="unigram:340")
        prepare(config, LENGTH, tmp_path / out)
    for split in ("train", "validation"):
        for path in (tmp_path / "text" / split).iterdir():
            assert path.read_bytes() == (tmp_path / "again" / split / path.name).read_bytes()
    assert open_prepared(tmp_path / "again")["splits"] == open_prepared(tmp_path / "text")["splits"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"packing": "best-fit"}, "was packed, which cuts long documents; prepare from the text again"),
        ({"lossy_tokenizer": True}, "its tokenizer changed the text; prepare from the text again"),
    ],
)
def test_text_that_is_not_in_the_tokens_is_refused(corpus, tmp_path, options, said):
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320", **options), LENGTH, tmp_path / "old")
    with pytest.raises(DataError, match=f"old/train: {said}"):
        texts(tmp_path / "old" / "train")


def test_a_flipped_bit_is_found(corpus, tmp_path):
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320"), LENGTH, tmp_path / "old")
    path = tmp_path / "old" / "train" / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard\.00001\.mds: is damaged; copy the folder again"):
        texts(tmp_path / "old" / "train")


def test_the_folder_itself_is_no_input(corpus, tmp_path):
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320"), LENGTH, tmp_path / "old")
    with pytest.raises(
        DataError, match=r"old: is prepared data; to prepare its text again, name a split, such as .*old/train"
    ):
        texts(tmp_path / "old")


def test_tokens_that_were_cut_within_a_character_are_refused(tmp_path):
    """They would be read as replacement characters. Such documents come from token files."""
    LOSSLESS["gpt2.json"](tmp_path / "gpt2.json")
    [ids] = load_tokenizer(tmp_path / "gpt2.json").encode_parts(["caf\u00e9"], [True])
    documents = [np.array(ids if number else ids[:-1], np.uint16) for number in range(9)]
    (tmp_path / "d.bin").write_bytes(b"".join(each.tobytes() for each in documents))
    sizes = np.array([len(each) for each in documents], np.int32)
    begins = 2 * (np.cumsum(sizes, dtype=np.int64) - sizes)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    numbers = np.arange(len(sizes) + 1, dtype=np.int64)
    (tmp_path / "d.idx").write_bytes(head + sizes.tobytes() + begins.tobytes() + numbers.tobytes())
    config = PrepareConfig(inputs=(str(tmp_path / "d.idx"),), tokenizer=str(tmp_path / "gpt2.json"))
    prepare(config, 8, tmp_path / "old")
    with pytest.raises(DataError, match="old/train:0: its tokens are not those of a text; prepare from the text again"):
        texts(tmp_path / "old" / "train")


def test_chats_are_no_text(corpus, tmp_path):
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:320"), LENGTH, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / MANIFEST).read_text())
    manifest["options"]["content"] = "chats"
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="old/train: holds chats, not text; prepare from the chats again"):
        texts(tmp_path / "old" / "train")
