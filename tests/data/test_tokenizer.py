"""Tokenizers lose nothing, count bytes exactly, and train to the same file again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import SPECIAL, TEXTS

from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "unigram"):
        train_tokenizer(TEXTS, f"{kind}:1000", folder / f"{kind}.model")
    return {kind: load_tokenizer(folder / f"{kind}.model") for kind in ("bpe", "unigram")}


def with_examples(test):
    for text in SPECIAL:
        test = example(text=text)(test)
    return test


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@with_examples
@given(text=st.text() | st.text(alphabet=" \t\n\rab1<>/s\u2581é😀"))
@settings(max_examples=200)
def test_any_text_survives_and_its_bytes_are_counted_exactly(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids
    assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_again_gives_the_same_file(trained, kind, tmp_path):
    train_tokenizer(iter(TEXTS), f"{kind}:1000", tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == trained[kind].path.read_bytes()
    assert load_tokenizer(tmp_path / "again.model").fingerprint == trained[kind].fingerprint
    train_tokenizer(TEXTS, f"{kind}:999", tmp_path / "other.model")
    assert load_tokenizer(tmp_path / "other.model").fingerprint != trained[kind].fingerprint


def test_another_process_trains_the_same_files(trained, tmp_path):
    program = (
        "import sys; from pathlib import Path; from texts import TEXTS; from data.tokenizer import train_tokenizer\n"
        "for kind in ('bpe', 'unigram'): train_tokenizer(TEXTS, f'{kind}:1000', Path(sys.argv[1], f'{kind}.model'))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    for kind, tokenizer in trained.items():
        assert (tmp_path / f"{kind}.model").read_bytes() == tokenizer.path.read_bytes()


def test_a_trained_tokenizer_suits_code(trained):
    tokenizer = trained["bpe"]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (1000, 2)
    assert len(tokenizer.encode("        ")) == 1  # an indent
    assert len(tokenizer.encode("2026")) == 4  # digits stay apart
    assert len(tokenizer.encode("\n\t")) == 2
    assert len(tokenizer.encode("self.")) < 4


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_that_the_text_cannot_fill_is_an_error_that_says_what_would_do(kind, tmp_path):
    text = ["to be or not to be, that is the question"] * 3
    with pytest.raises(
        DataError, match=rf"{kind}:5000: the text gives at most (\d+) tokens; choose {kind}:\d+ or less"
    ) as caught:
        train_tokenizer(text, f"{kind}:5000", tmp_path / "a.model")
    train_tokenizer(text, str(caught.value).split("; choose ")[1].split()[0], tmp_path / "a.model")
    with pytest.raises(DataError, match=r"bytes and single characters alone need \d+ tokens"):
        train_tokenizer(text, f"{kind}:200", tmp_path / "b.model")
    with pytest.raises(DataError, match="no text to train the tokenizer on"):
        train_tokenizer(["\n"], f"{kind}:300", tmp_path / "c.model")


def make_json_tokenizer(path, kind: str, end: str = "<|endoftext|>"):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "byte fallback"))
    if kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = []
    special = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte fallback" else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.splitlines()], trainer)
    tokenizer.add_special_tokens([end])
    tokenizer.add_tokens([AddedToken("tritrain", normalized=False)])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    if special:  # bytes are ordinary tokens: a trainer has no other way to put them first
        definition = json.loads(path.read_text())
        definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in special]
        path.write_text(json.dumps(definition))
    return path


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_tokenizer_json_is_read_without_specials_or_truncation(kind, tmp_path):
    tokenizer = load_tokenizer(make_json_tokenizer(tmp_path / "tokenizer.json", kind))
    sizes = tokenizer.token_bytes()
    assert tokenizer.vocab_size == len(sizes)
    assert sizes[tokenizer.end_of_document] == 0
    for text in ["def f(x):\n    return x + 1\n" * 3, "é😀 tritrain", "a <|endoftext|> b"]:
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document not in ids  # the name of a special token in a document is only text
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert tokenizer.encode_batch([text]) == [ids]
    assert np.array_equal(load_tokenizer(tmp_path).token_bytes(), sizes)  # a folder that holds one


def test_tokenizer_files_that_cannot_serve_are_errors(tmp_path):
    path = make_json_tokenizer(tmp_path / "a.json", "byte level", end="<|finis|>")
    with pytest.raises(DataError, match=r"no token ends a document: .*\['<\|finis\|>'\] is one of \['</s>'"):
        load_tokenizer(path)
    for name, content, message in [
        ("b.json", "{", "not a tokenizer of the `tokenizers` library"),
        ("b.model", "nonsense", "not a SentencePiece model"),
        ("b.bin", "", r"not '\.bin'"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
