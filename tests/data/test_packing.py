"""Best-fit packing: every token of every document is predicted exactly once, and nothing else is."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_corpus

import data.packing
from data.config import DataConfig, PrepareConfig
from data.loader import IGNORED_LABEL, TrainingData, validation_rows
from data.packing import Packer
from data.shards import prepare
from data.sources import Source
from data.tokenizer import load_tokenizer

END = 0
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def packed(lengths: list[int], length: int) -> tuple[list[np.ndarray], list[np.ndarray], Packer]:
    """Documents of ever new tokens, and their rows."""
    numbers = iter(range(1, 10**6))
    documents = [np.array([next(numbers) for _ in range(size)], np.uint32) for size in lengths]
    packer = Packer(END, length)
    rows = [row for document in documents for row in packer.add(document)]
    return documents, [*rows, *packer.finish()], packer


@given(lengths=LENGTHS, length=st.integers(2, 24))
def test_every_token_and_every_end_is_predicted_once(lengths: list[int], length: int) -> None:
    documents, rows, packer = packed(lengths, length)
    assert {len(row) for row in rows} == {length + 1}
    predicted: list[tuple[int, int]] = []
    ends = 0
    for row in rows:
        for before, label in pairwise(row):
            if before == END and label == END:
                continue
            ends += label == END
            predicted.append((int(before), int(label)))
    expected = [pair for document in documents for pair in zip([END, *document], [*document, END], strict=True)]
    assert sorted(predicted) == sorted((int(a), int(b)) for a, b in expected)
    assert ends == len(documents)
    assert packer.padding_tokens == len(rows) * length - len(predicted)


@given(lengths=LENGTHS, length=st.integers(2, 24))
def test_documents_that_fit_stay_whole_and_rests_come_first(lengths: list[int], length: int) -> None:
    documents, rows, _ = packed(lengths, length)
    place = {int(token): (number, at) for number, row in enumerate(rows) for at, token in enumerate(row[:length])}
    for document in documents:
        if len(document) < length:
            number, at = place[int(document[0])]
            assert [place[int(token)] for token in document] == [(number, at + i) for i in range(len(document))]
            assert rows[number][at - 1] == END
        elif rest := (len(document) + 1) % length:
            assert [place[int(token)][1] for token in document[-rest:]] == list(range(rest))


def test_a_document_goes_where_it_leaves_the_least_room(monkeypatch) -> None:
    _, rows, packer = packed([5, 7, 2, 1], 9)  # room for 3 and 1 after two; 2 fits into the first, then 1 nowhere
    assert [np.count_nonzero(row) for row in rows] == [7, 7, 1]
    assert packer.padding_tokens == 1 + 7
    monkeypatch.setattr(data.packing, "OPEN_ROWS", 1)
    _, rows, _ = packed([5, 7, 2, 1], 9)  # the fullest row is closed for the next
    assert [np.count_nonzero(row) for row in rows] == [5, 7, 3]


def test_prepared_rows_are_read_with_labels_that_count(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    config = PrepareConfig(
        inputs=(str(corpus),), tokenizer="bpe:320", validation_fraction=0.2, packing="best-fit", workers=1
    )
    manifest = prepare(config, 64, tmp_path / "packed")
    facts = manifest["splits"]["train"]
    assert facts["dropped_tokens"] == 0
    source = DataConfig(
        sources=(Source(path=str(tmp_path / "packed")),), sequence_length=64, documents="masked", shuffle=False,
        workers=0,
    )  # fmt: skip
    loaded = TrainingData(
        source, vocab_size=320, global_batch_sequences=1, micro_batch_sequences=1, rank=0, world_size=1
    )
    tokenizer = load_tokenizer(tmp_path / "packed")
    assert (loaded.has_padding, loaded.first_token) == (True, tokenizer.end_of_document)
    counted, seen = 0, []
    batches = iter(loaded)
    for _ in range(facts["rows"]):
        tokens, labels = next(batches)
        counts = labels != IGNORED_LABEL
        counted += int(counts.sum())
        seen += labels[counts].tolist()
        assert bool((tokens[~counts] == tokenizer.end_of_document).all())
    loaded.close()
    assert counted == facts["tokens"] == facts["rows"] * 64 - facts["padding_tokens"]
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert seen.count(tokenizer.end_of_document) == facts["documents"] < len(documents)
    held_out = validation_rows(source, vocab_size=320, micro_batch_sequences=2, rank=0, world_size=1)
    assert any(bool((labels == IGNORED_LABEL).any()) for _, labels in held_out)
    again = prepare(config, 64, tmp_path / "packed")
    assert again == manifest
    other = prepare(PrepareConfig(**{**vars(config), "workers": 2}), 64, tmp_path / "other")
    assert other["splits"] == manifest["splits"]


def test_open_rows_hold_a_bounded_number_of_tokens(monkeypatch) -> None:
    monkeypatch.setattr(data.packing, "OPEN_TOKENS", 40)
    packer, open_rows = Packer(END, 9), []
    for _ in range(20):
        list(packer.add(np.ones(5, np.uint32)))
        open_rows.append(len(packer.state()[0]["rows"]))
    assert max(open_rows) == 4
    monkeypatch.setattr(data.packing, "OPEN_TOKENS", 3)
    assert len(packed([5, 5, 5], 9)[1]) == 3
