"""Long texts: read in blocks, cut into pieces, and tokenized as if they were whole."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import LOSSLESS

from data import documents, encoding, proof, readers, tokenizer_kinds
from data.config import PrepareConfig
from data.documents import Document
from data.encoding import Piece, cut_documents, encode_pieces, gather_work
from data.errors import DataError
from data.filters import Filters
from data.readers import read_documents
from data.shards import prepare
from data.tokenizer import load_tokenizer

WORDS = "The cat sat on the mat.\n  Its  tail\u2581was long, é 日本語 and 😀.\n\nnext" * 3


@given(st.text(max_size=60), st.integers(1, 9), st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_in_blocks_is_its_text(tmp_path, text, read_bytes, block_chars):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "READ_BYTES", read_bytes)
        patch.setattr(documents, "BLOCK_CHARS", block_chars)
        assert list(Document(path, "a").blocks()) == list(Document(text, "a").blocks())
        assert Document(path, "a").text == text
        assert Document(path, "a").uniform() == Document(text, "a").uniform()


def test_the_order_of_keys_does_not_decide_whether_a_record_is_held_out() -> None:
    one, two = (
        json.dumps([message]) for message in ({"role": "user", "content": "é"}, {"content": "é", "role": "user"})
    )
    assert Document(one, "a").uniform(is_record=True) == Document(two, "a").uniform(is_record=True)
    assert Filters("chats", True, None).findings(lambda: [one]) == Filters("chats", True, None).findings(lambda: [two])
    assert Filters("text", True, None).findings(lambda: [one]) != Filters("text", True, None).findings(lambda: [two])


@pytest.mark.parametrize(("content", "at"), [(b"abc\xff", 3), ("é".encode() * 5 + b"\xc3", 10), (b"ab\xc3x", 2)])
def test_the_byte_that_is_no_text_is_named_in_long_files_too(tmp_path, monkeypatch, content, at):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for whole_bytes in (1, 100):
        monkeypatch.setattr(readers, "WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr(documents, "READ_BYTES", 3)
        with pytest.raises(DataError, match=rf"a\.txt: byte {at} is not UTF-8"):
            [document.text for document in read_documents([str(path)])]


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_tokens_of_the_pieces_are_those_of_the_text(tmp_path, monkeypatch, name):
    LOSSLESS[name](tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / name)
    monkeypatch.setattr(tokenizer_kinds, "SEGMENT_CHARS", 20)
    monkeypatch.setattr(documents, "BLOCK_CHARS", 7)
    texts = [WORDS, "cat", "  the mat", "x" * 50, " " * 70]
    assigned = [("train", (0, row), Document(text, f"text {row}")) for row, text in enumerate(texts)]
    pieces = [piece for _, piece in cut_documents(assigned, tokenizer)]
    assert "".join(piece.text for piece in pieces) == "".join(texts)
    assert [piece.origin for piece in pieces if piece.ends] == [document.origin for _, _, document in assigned]
    assert len(pieces) > 2 * len(texts)
    chunks = [encode_pieces(tokenizer, pieces[at : at + 2]) for at in range(0, len(pieces), 2)]
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_document]]
    assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == ids
    assert sum(chunk.total("documents") for chunk in chunks) == len(texts)
    assert sum(chunk.total("text_bytes") for chunk in chunks) == sum(len(text.encode()) for text in texts)
    assert sum(chunk.total("token_bytes") for chunk in chunks) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_a_long_file_becomes_the_same_rows_in_blocks(tmp_path, monkeypatch, packing):
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(WORDS[number:] * 10)
    options = {
        "inputs": (str(tmp_path / "in"),),
        "tokenizer": "bpe:300",
        "validation_fraction": 0.4,
        "packing": packing,
    }
    monkeypatch.setattr(tokenizer_kinds, "SEGMENT_CHARS", 500)
    folders = []
    for whole_bytes, chars in ((1 << 24, 1 << 20), (50, 200)):
        monkeypatch.setattr(readers, "WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr(encoding, "CHUNK_CHARS", chars)
        out = tmp_path / f"out{whole_bytes}"
        prepare(PrepareConfig(**options), 16, out)
        folders.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert folders[0] == folders[1]


def test_a_change_in_a_later_piece_is_found(tmp_path, monkeypatch):
    LOSSLESS["llama2.model"](tmp_path / "llama2.model")
    tokenizer = load_tokenizer(tmp_path / "llama2.model")
    pieces = [Piece("the cat", "a", (0, 0, 0), ends=False), Piece(" sat", "a", (0, 0, 1), ends=True)]
    encoded = tokenizer.encode_parts([piece.text for piece in pieces], [True, False])
    encoded[1].append(tokenizer.end_of_document)
    sizes = tokenizer.token_bytes()
    num_bytes = np.array([sizes[ids].sum() for ids in encoded])
    proof.check_given_back(tokenizer, pieces, encoded, num_bytes)
    for changed in ([encoded[0][:-1], encoded[1]], [encoded[0], encoded[1][1:]]):
        with pytest.raises(proof.ChangedTextError):
            proof.check_given_back(tokenizer, pieces, changed, np.array([sizes[ids].sum() for ids in changed]))
    ended = [[*encoded[0], tokenizer.end_of_document], encoded[1]]
    with pytest.raises(proof.ChangedTextError, match="the token that ends documents"):
        proof.check_given_back(tokenizer, pieces, ended, num_bytes)


@pytest.mark.parametrize("line", ["a line of text that is short\n", "no line at all, "])
def test_a_file_of_any_size_needs_a_bounded_memory(tmp_path, line):
    LOSSLESS["llama2.model"](tmp_path / "llama2.model")
    tokenizer = load_tokenizer(tmp_path / "llama2.model")
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for _ in range(70):
            file.write(line * (1 << 16))
    num_bytes = path.stat().st_size
    assert num_bytes > 64 << 20
    tracemalloc.start()
    try:
        assigned = (("train", (0, 0), document) for document in read_documents([str(path)]))
        works = gather_work(cut_documents(assigned, tokenizer), (-1, 0, 0), {})
        found = sum(len(piece.text) for work in works for piece in work.pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == num_bytes
    assert peak < 40 << 20  # 16 MiB to find out that the file is long, and some pieces
