"""Byte-level BPE in GGUF files: what is written gives the same tokens again, and what llama.cpp lacks is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import SPECIAL, TEXTS
from tokenizer_zoo import LLAMA3, LOSSLESS, LOSSY, Oracle, byte_level, byte_level_family

from data.errors import DataError
from data.gguf_byte_level import PRE_TOKENIZERS, byte_level_vocabulary
from data.gguf_tokenizer import gguf_tokenizer_file
from data.gguf_vocabulary import gguf_vocabulary
from data.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED
from data.tokenizer import load_tokenizer
from data.tokenizer_definition import read_definition

FAMILIES = [name for name, _ in PRE_TOKENIZERS]


def fields_of(vocabulary: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_same_tokens_again(tmp_path: Path, family: str) -> None:
    byte_level_family(tmp_path / "tokenizer.json", family)
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = gguf_vocabulary(tmp_path / "tokenizer.json", tokenizer.vocab_size + 3)
    assert (vocabulary["model"], vocabulary["pre"]) == ("gpt2", family)
    assert vocabulary["token_type"][-3:] == [UNUSED] * 3
    assert vocabulary["bos_token_id"] == vocabulary["eos_token_id"] == tokenizer.end_of_document
    (tmp_path / "again").mkdir()
    again = load_tokenizer(gguf_tokenizer_file(fields_of(vocabulary), tmp_path / "again"))
    assert (again.vocab_size, again.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    for text in [*SPECIAL, *TEXTS[:4], "Hello 2026\n\n  can't <|endoftext|>", "x" * 99]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text


def test_tokens_have_the_kind_that_finds_them_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level_family(path, "smollm")
    definition = json.loads(path.read_text())
    size = len(definition["model"]["vocab"]) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] += [
        {"id": size, "content": "<|im_start|>", "special": True, **plain},
        {"id": size + 1, "content": "<think>", "special": False, **plain},
    ]
    path.write_text(json.dumps(definition))
    types = gguf_vocabulary(path, size + 2, first_token=size)["token_type"]
    assert (types[size], types[size + 1]) == (CONTROL, USER_DEFINED)
    assert types[1] == NORMAL
    definition["added_tokens"][-1]["lstrip"] = True
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError, match="the added token '<think>' takes spaces or words around it along"):
        gguf_vocabulary(path, size + 2)


OTHERS: dict[str, Callable[[Path], Oracle]] = {
    "is a Unigram model": LOSSY["first.json"],
    "is a BPE model of characters": LOSSLESS["llama2.json"],
    "divides texts into words in a way of its own": LOSSLESS["gpt2-prefix.json"],
    "divides texts into words in a way of its own; llama.cpp's ways": LOSSLESS["deepseek.json"],
    "has a end_of_word_suffix": LOSSY["clip.json"],
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_llama_cpp_divides_in_another_way_is_refused(tmp_path: Path, message: str) -> None:
    OTHERS[message](tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=message):
        byte_level_vocabulary(read_definition(tmp_path / "tokenizer.json"))


def test_normalization_other_than_nfc_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers

    byte_level_family(tmp_path / "tokenizer.json", "qwen2")
    byte_level(tmp_path / "other.json", "<|endoftext|>", normalizer=normalizers.NFKC())
    assert read_definition(tmp_path / "tokenizer.json")["normalizer"] == {"type": "NFC"}
    with pytest.raises(ValueError, match="changes texts before it divides them, other than to NFC"):
        byte_level_vocabulary(read_definition(tmp_path / "other.json"))


def test_an_unknown_division_is_not_guessed(tmp_path: Path) -> None:
    byte_level_family(tmp_path / "tokenizer.json", "llama-bpe")
    fields = fields_of(gguf_vocabulary(tmp_path / "tokenizer.json", 800))
    for changed, message in (
        ({"tokenizer.ggml.pre": "tekken"}, r"pre 'tekken' divides texts in a way that is not known here"),
        ({"tokenizer.ggml.merges": ["a"]}, "needs merges, pairs of tokens"),
        ({"tokenizer.ggml.model": "bert"}, "for the tokenizer 'bert'"),
    ):
        with pytest.raises(DataError, match=message):
            gguf_tokenizer_file(fields | changed, tmp_path)


def test_patterns_are_those_of_published_tokenizers() -> None:
    assert PRE_TOKENIZERS[("llama-bpe", True)][0]["pattern"] == {"Regex": LLAMA3}
