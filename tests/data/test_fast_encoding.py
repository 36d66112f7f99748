"""`fastokens` encodes where its ids are those of the tokenizer's own library, and nowhere else."""

import json

import numpy as np
import pytest
from texts import TEXTS
from tokenizer_zoo import LOSSLESS, LOSSY

from data import fast_encoding
from data.config import PrepareConfig
from data.errors import DataError
from data.fast_encoding import FastEncoder, fast_encoder
from data.quickstart_corpus import read_standard_library
from data.shards import prepare
from data.tokenizer import load_tokenizer

pytest.importorskip("fastokens")

FAST = {"bpe.model", "llama2.model", "llama2.json", "gpt2.json", "gpt2-prefix.json", "llama3.json", "deepseek.json",
        "gemma.json", "qwen.json"}  # fmt: skip
"""Kinds that it knows, with equal ids; the others stay with their own library."""


@pytest.mark.parametrize("name", LOSSLESS | LOSSY)
def test_the_ids_are_those_of_the_tokenizer_s_own_library(tmp_path, name):
    (LOSSLESS | LOSSY)[name](tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / name)
    encoder = fast_encoder(tokenizer)
    assert (encoder is not None) == (name in FAST)
    if encoder is None:
        return
    names = [tokenizer.name_of(token) for token in range(0, tokenizer.vocab_size, 13)]
    spelled = [*names, "<0x0A>", "x<0x41>y <s></s><unk> <|endoftext|>", *map("a {} b".format, names)]
    texts = [
        *TEXTS,
        *filter(None, spelled),
        *(text for name, text in read_standard_library() if name.startswith("json/")),
    ]
    expected = tokenizer.encode_batch(texts)
    tokenizer.fast = encoder
    assert tokenizer.encode_batch(texts) == expected


def small(folder) -> PrepareConfig:
    LOSSLESS["gpt2.json"](folder / "t.json")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS if text))
    return PrepareConfig(inputs=(str(folder / "a.jsonl"),), tokenizer=str(folder / "t.json"))


def test_prepare_uses_it_says_so_and_writes_the_same(tmp_path, monkeypatch):
    config, said = small(tmp_path), []
    prepare(config, 8, tmp_path / "fast", said.append)
    assert said[-1].library.startswith("fastokens 0.")
    with monkeypatch.context() as patch:
        patch.setattr(fast_encoding, "NAME", "not_installed")
        prepare(config, 8, tmp_path / "own", said.append)
    assert said[-1].library == ""
    contents = [
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "fast", tmp_path / "own")
    ]
    assert contents[0] == contents[1]


def test_other_ids_are_an_error_that_names_the_text(tmp_path, monkeypatch):
    config = small(tmp_path)
    encode = FastEncoder.encode

    def wrong(self, texts):
        ids = encode(self, texts)
        return [[*each[:-1], each[-1] ^ 1] if "cat" in text else each for text, each in zip(texts, ids, strict=True)]

    monkeypatch.setattr(FastEncoder, "encode", wrong)
    monkeypatch.setattr(fast_encoding, "PROBES", ("dog",))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a dog"}) + "\n" + json.dumps({"text": "a cat"}))
    with pytest.raises(
        DataError, match=r"fastokens 0.* encodes a text in another way .*'a cat'.*; uninstall fastokens"
    ):
        prepare(config, 2, tmp_path / "out")
    monkeypatch.setattr(fast_encoding, "PROBES", ("cat",))
    prepare(config, 2, tmp_path / "out")  # found before the work: it is not used
    assert np.load(tmp_path / "out" / "token_bytes.npy").any()


def test_of_long_texts_the_beginning_is_compared(tmp_path, monkeypatch):
    LOSSLESS["gpt2.json"](tmp_path / "t.json")
    tokenizer = load_tokenizer(tmp_path / "t.json")
    encoder = fast_encoder(tokenizer)
    compared = []
    monkeypatch.setattr(encoder, "_exact", lambda texts: compared.append(texts) or tokenizer.encode_pieces(texts))
    monkeypatch.setattr(fast_encoding, "COMPARED_CHARS", 3)
    monkeypatch.setattr(fast_encoding, "COMPARED_TEXTS", 2)
    encoder.encode_compared(["the cat", "sat on the mat", "and slept"])
    assert compared == [["the", "sat"]]
