"""`tritrain inspect` says of a prepared folder what went in."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_corpus
from typer.testing import CliRunner

from data.config import PrepareConfig
from data.shards import prepare
from data.tokenizer import load_tokenizer
from launcher.cli import app


def inspected(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["inspect", str(folder), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_the_numbers_are_those_of_the_text(tmp_path, packing):
    corpus = write_corpus(tmp_path / "a.jsonl", num_documents=50)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300", packing=packing, validation_fraction=0.2)
    length = 256
    manifest = prepare(config, length, tmp_path / "out")
    found = json.loads(inspected(tmp_path / "out", "--json"))
    assert (found["sequence_length"], found["vocab_size"], found["packing"]) == (length, 300, packing)
    tokenizer = load_tokenizer(tmp_path / "out")
    lengths = [len(tokenizer.encode(text)) for text in texts]
    splits = found["splits"]
    assert set(splits) == {"train", "validation"}
    for split, facts in manifest["splits"].items():
        seen = splits[split]
        assert (seen["rows"], seen["documents"]) == (facts["rows"], facts["documents"])
        assert seen["bytes_per_token"] == facts["text_bytes"] / facts["tokens"]
        padding = facts.get("padding_tokens", 0) / (facts["rows"] * length)
        assert seen["padding"] == pytest.approx(padding, abs=1e-12)
        assert seen["largest_token"] < 300
        assert any(text[:20] in sample for sample in seen["samples"] for text in texts)
    if packing == "best-fit":
        whole = [tokens for tokens in lengths if tokens < length]
        expected = {str(power): int(count) for power, count in zip(*_by_power(whole), strict=True)}
        counted = [splits[split]["lengths"] for split in splits]
        total = {key: sum(each.get(key, 0) for each in counted) for key in {*counted[0], *counted[1]}}
        assert total == expected
    else:
        assert 45 <= sum(split["whole_documents"] for split in splits.values()) <= 50


def test_padding_is_that_of_all_rows(tmp_path):
    """Best fit writes the fullest rows first."""
    corpus = write_corpus(tmp_path / "a.jsonl", num_documents=50)
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300", packing="best-fit")
    facts = prepare(config, 256, tmp_path / "out")["splits"]["train"]
    output = inspected(tmp_path / "out", "--rows", "3")
    assert (
        f"{facts['padding_tokens'] / (facts['rows'] * 256):.2%} padding\nIn the first 3 rows, the fullest: " in output
    )


def _by_power(lengths):
    return np.unique([1 << (tokens.bit_length() - 1) for tokens in lengths], return_counts=True)


def test_a_person_gets_lines_and_few_rows_are_read(tmp_path):
    corpus = write_corpus(tmp_path / "a.jsonl", num_documents=50)
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300"), 32, tmp_path / "out")
    output = inspected(tmp_path / "out", "--rows", "3", "--samples", "1")
    assert "rows of 32 tokens, packing stream, 300 tokens in the vocabulary" in output
    assert " bytes per token, 0.00% padding\nIn the first 3 rows: " in output
    assert output.count("\n> ") == 1
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "nowhere")])
    assert "no such folder of prepared data" in str(result.exception)
