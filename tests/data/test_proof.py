"""`prepare` refuses a tokenizer that changes its text or miscounts its bytes, and names the document."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizer_zoo import LOSSLESS, LOSSY, byte_level

from data import proof
from data.config import DataConfig, PrepareConfig
from data.encoding import Piece
from data.errors import DataError
from data.loader import token_bytes
from data.mixture import Source
from data.shards import prepare
from data.tokenizer import load_tokenizer, train_tokenizer

WORDS = "the cat sat on the mat"


def write(path, *texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.mark.parametrize(
    ("workers", "name", "text", "message"),
    [
        (1, "bert.json", "The cat", r"0, 'The cat' becomes 'the cat'; lost are U\+0054 LATIN CAPITAL LETTER T"),
        (2, "qwen.json", "cafe\u0301", r"3, .*lost are U\+0065 LATIN SMALL LETTER E, U\+0301 COMBINING ACUTE"),
        (1, "t5.model", "a  b", "2, 'a  b' becomes 'a b'"),
        (1, "always.json", "a\u2581b", "1, 'a\u2581b' becomes 'a b'; lost are U.2581 LOWER ONE EIGHTH BLOCK"),
    ],
)
def test_changed_text_is_refused_with_its_place(tmp_path, name, text, message, workers):
    LOSSY[name](tmp_path / name)
    file = write(tmp_path / "a.jsonl", WORDS, WORDS, text, WORDS)
    config = PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / name), workers=workers)
    with pytest.raises(
        DataError, match=rf"a\.jsonl:3: the tokenizer does not give the text back: .*{message}"
    ) as caught:
        prepare(config, 4, tmp_path / "out")
    assert "--lossy-tokenizer" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_sample_that_is_decoded_depends_on_places_alone():
    def pieces(places):
        return [Piece("text", "file", place, ends=True) for place in places]

    first = pieces([(file, document, 0) for file in range(16) for document in range(16)])
    assert all(proof.is_compared(piece) for piece in first)
    later = pieces([(file, document, part) for file in (0, 99) for document in range(16, 5000) for part in (0, 1)])
    share = sum(proof.is_compared(piece) for piece in later) / len(later)
    assert share == pytest.approx(1 / 16, rel=0.05)
    assert not proof.is_compared(replace(first[0], tokens=np.arange(3)))


def test_lost_bytes_are_found_in_every_document(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "COMPARED_SHARE", 0)  # only the first 16 documents are decoded
    LOSSY["t5.model"](tmp_path / "t5.model")
    file = write(tmp_path / "a.jsonl", *[WORDS] * 20, "the  cat", *[WORDS] * 20)
    with pytest.raises(DataError, match=r"a\.jsonl:21: .*'the  cat' becomes 'the cat'"):
        prepare(PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / "t5.model")), 4, tmp_path / "out")


def test_an_end_of_documents_in_the_text_is_refused(tmp_path):
    byte_level(tmp_path / "t.json", "<|endoftext|>")
    definition = json.loads((tmp_path / "t.json").read_text())
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": "Q"}, "content": "<|endoftext|>"}
    (tmp_path / "t.json").write_text(json.dumps(definition))
    file = write(tmp_path / "a.jsonl", WORDS, "Q")
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        prepare(PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / "t.json")), 4, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama2.model", "llama2.json", "gpt2-prefix.json", "clip.json", "bert.json"])
def test_bytes_of_all_tokens_are_those_of_the_text(tmp_path, name):
    (LOSSLESS | LOSSY)[name](tmp_path / name)
    texts = [WORDS, "the mat", "cat", "on the cat"]
    file = write(tmp_path / "a.jsonl", *texts)
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / name)), 1, out)
    facts = manifest["splits"]["train"]
    tokenizer, sizes = load_tokenizer(out), np.load(out / "token_bytes.npy")
    assert facts["dropped_tokens"] == 0
    encoded = [
        [*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch([WORDS, "the mat", "cat", "on the cat"])
    ]
    assert sum(map(len, encoded)) == facts["tokens"]
    assert sum(sizes[ids].sum() for ids in encoded) == facts["text_bytes"]
    assert (manifest["compared_documents"], manifest["changed_documents"]) == (4, 0)


def test_a_lossy_tokenizer_may_be_accepted_and_its_bytes_are_right_on_average(tmp_path):
    LOSSY["bert.json"](tmp_path / "bert.json")
    texts = [WORDS, "The  Cat sat!", "日本語 on the mat \u2581"]
    file = write(tmp_path / "a.jsonl", *texts)
    config = PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / "bert.json"), lossy_tokenizer=True)
    out = tmp_path / "out"
    manifest = prepare(config, 1, out)
    assert (manifest["compared_documents"], manifest["changed_documents"]) == (3, 2)
    assert manifest["options"]["lossy_tokenizer"] is True
    tokenizer = load_tokenizer(out)
    data = DataConfig(sources=(Source(path=str(out)),), sequence_length=1)
    sizes = token_bytes(data, tokenizer.vocab_size).numpy()
    total = sum(sizes[[*tokenizer.encode(text), tokenizer.end_of_document]].sum() for text in texts)
    assert total == pytest.approx(manifest["splits"]["train"]["text_bytes"], rel=1e-12)
    with pytest.raises(DataError, match=r"different lossy_tokenizer \(there True, wanted False\)"):
        prepare(PrepareConfig(inputs=(file,), tokenizer=str(tmp_path / "bert.json")), 1, out)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("spaces", [0, 1])
def test_a_trained_tokenizer_has_a_space_though_its_text_hardly_has(tmp_path, kind, spaces):
    text = "".join(chr(0x4E00 + i * i % 97) for i in range(9000)) + " x" * spaces
    train_tokenizer([text], f"{kind}:311", tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    for each in (text, " ", "一 二  三 "):
        ids = tokenizer.encode(each)
        assert tokenizer.decode(ids) == each
        assert tokenizer.token_bytes()[ids].sum() == len(each.encode())


def test_dropout_does_not_draw_the_ids(tmp_path):
    oracle = byte_level(tmp_path / "t.json", "<|endoftext|>")
    definition = json.loads((tmp_path / "t.json").read_text())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    for _ in range(9):
        assert tokenizer.encode(WORDS) == oracle.encode(WORDS)


def test_a_lossy_tokenizer_ends_no_document_where_the_text_goes_on(tmp_path):
    """What is unknown to it may be lost, but is no end."""
    words = {word: number for number, word in enumerate(["<|endoftext|>", "the", "cat", "sat"])}
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"},
    }
    (tmp_path / "t.json").write_text(json.dumps(definition))
    file = write(tmp_path / "a.jsonl", "the cat", "the red cat")
    config = PrepareConfig(
        inputs=(file,), tokenizer=str(tmp_path / "t.json"), lossy_tokenizer=True, end_of_document="<|endoftext|>"
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: its text becomes '<\|endoftext\|>', the token that ends"):
        prepare(config, 4, tmp_path / "out")
