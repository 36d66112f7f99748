"""Loss on text: every token once, whatever the windows; bits per byte by hand and across tokenizers."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval.perplexity
from data.documents import Document
from data.errors import DataError
from eval.errors import NotFiniteError
from eval.perplexity import windows
from eval.rows import IGNORED_LABEL, Scorer

END = 0


class Characters:
    """A tokenizer of single characters, or of pairs of them."""

    end_of_document = END

    def __init__(self, size=1):
        self.size, self.texts = size, {}

    def encode_batch(self, texts):
        encoded = [
            [1 + sum(map(ord, text[n : n + self.size])) % 1000 for n in range(0, len(text), self.size)]
            for text in texts
        ]
        self.texts |= zip(map(tuple, encoded), texts, strict=True)
        return encoded

    def decode(self, ids):
        return self.texts[tuple(ids)]


class Uncased(Characters):
    """A tokenizer that loses capitals."""

    def encode_batch(self, texts):
        return super().encode_batch([text.lower() for text in texts])


def text_loss(scorer, tokenizer, texts, *, first_token=END, **options):
    documents = (Document(text, f"text {number}") for number, text in enumerate(texts))
    return eval.perplexity.text_loss(scorer, tokenizer, documents, first_token=first_token, **options)


def constant(nats, window_tokens=8):
    """Every label that counts costs so many nats."""
    return Scorer(lambda tokens, labels: (labels != IGNORED_LABEL).double() * nats, window_tokens)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 12), st.integers(1, 12))
def test_every_token_counts_once_with_the_most_context_that_stride_allows(rest, window_tokens, stride_tokens):
    stride_tokens, tokens = min(stride_tokens, window_tokens), [END, *rest]
    counted = {}
    begin = 0
    labels = [IGNORED_LABEL if token == END else token for token in tokens]
    for row in windows(tokens, labels, window_tokens, stride_tokens):
        assert 0 < len(row.tokens) == len(row.labels) <= window_tokens
        assert list(row.tokens) == tokens[begin : begin + len(row.tokens)]
        for place, label in enumerate(row.labels, start=begin + 1):
            if label != IGNORED_LABEL:
                assert label == tokens[place]
                assert place not in counted
                counted[place] = place - begin
        begin += stride_tokens
    assert counted.keys() == {place for place, token in enumerate(tokens) if place and token != END}
    assert all(context >= min(place, window_tokens - stride_tokens + 1) for place, context in counted.items())


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("stride_tokens", [3, 8])
def test_bits_per_byte_and_perplexity_by_hand(stride_tokens, apart):
    texts = ["abcde" * 5, "", "né", "x"]
    told = []
    loss = text_loss(
        constant(math.log(2)), Characters(), texts, stride_tokens=stride_tokens, apart=apart, advance=told.append
    )
    assert (loss.num_documents, loss.num_tokens, loss.num_bytes) == (3, 28, 29)
    assert math.isclose(loss.bits_per_byte, 28 / 29)
    assert math.isclose(loss.perplexity, 2.0)
    assert told == [29]
    assert loss.num_changed_documents == 0


@pytest.mark.parametrize("apart", [True, False])
def test_documents_that_a_tokenizer_changes_are_counted(apart):
    texts = ["abc", "Abc", "", "d", "É"]
    assert text_loss(constant(1.0), Uncased(), texts, stride_tokens=8, apart=apart).num_changed_documents == 2


def test_another_tokenizer_changes_perplexity_but_not_bits_per_byte():
    """The same probability of the text, in tokens of half the number."""
    text = ["abcdefgh" * 4]
    single = text_loss(constant(1.0), Characters(1), text, stride_tokens=8)
    pairs = text_loss(constant(2.0), Characters(2), text, stride_tokens=8)
    assert math.isclose(single.bits_per_byte, pairs.bits_per_byte)
    assert math.isclose(pairs.perplexity, single.perplexity**2)


def test_documents_apart_see_nothing_of_each_other():
    """A model to which a character is certain where it has been before in the window."""

    def token_nll(tokens_BT, labels_BTA):
        labels_BT = labels_BTA.squeeze(2)
        seen_BTT = tokens_BT[:, None, :] == labels_BT[:, :, None]
        seen_BTT &= torch.tril(torch.ones(seen_BTT.shape[1:], dtype=torch.bool))
        return torch.where(seen_BTT.any(-1)[:, :, None], 0.0, 1.0) * (labels_BTA != IGNORED_LABEL)

    scorer = Scorer(token_nll, 32)
    apart = text_loss(scorer, Characters(), ["abc", "abc"], stride_tokens=32)
    stream = text_loss(scorer, Characters(), ["abc", "abc"], stride_tokens=32, apart=False)
    assert (apart.nats, stream.nats) == (6.0, 3.0)


def test_overlapping_windows_see_more(monkeypatch):
    def token_nll(tokens_BT, labels_BTA):
        place_T1 = torch.arange(tokens_BT.shape[1])[:, None]
        return (1.0 / (1 + place_T1)) * (labels_BTA != IGNORED_LABEL)

    losses = [
        text_loss(Scorer(token_nll, 16), Characters(), ["abcdefg" * 20], stride_tokens=stride).nats
        for stride in (16, 8, 1)
    ]
    assert losses == sorted(losses, reverse=True)
    monkeypatch.setattr(eval.perplexity, "TOKENS_AT_ONCE", 100)
    texts = ["abcdefg" * 20] * 3
    told = []
    loss = text_loss(Scorer(token_nll, 16), Characters(), texts, stride_tokens=16, advance=told.append)
    assert loss.nats == pytest.approx(3 * losses[0])
    assert told == [140, 140, 140, 0]


def test_no_text_is_an_error():
    with pytest.raises(DataError, match="no text"):
        text_loss(constant(1.0), Characters(), ["", ""], stride_tokens=8)


class Recorder(Scorer):
    """A scorer that keeps the rows it is given."""

    rows: ClassVar = []

    def log_likelihoods(self, rows, advance=None):
        self.rows.extend(rows)
        return super().log_likelihoods(rows)


@pytest.mark.parametrize("apart", [True, False])
def test_every_document_begins_with_the_first_token_and_its_own_tokens_all_count(apart):
    """Even one with the first token's number: it is a label by its place."""
    Recorder.rows.clear()
    texts, first_token = ["abc", "d", "b"], 1 + ord("b")
    model = Recorder(constant(1.0).token_nll, 8)
    loss = text_loss(model, Characters(), texts, first_token=first_token, stride_tokens=8, apart=apart)
    assert loss.num_tokens == 5
    assert loss.nats == 5
    beginnings = [row.tokens[0] for row in Recorder.rows]
    assert beginnings == [first_token] * (3 if apart else 1)


@pytest.mark.parametrize("apart", [True, False])
def test_a_document_whose_loss_is_not_finite_is_named(apart):
    def token_nll(tokens_BT, labels_BTA):
        return torch.where(labels_BTA == 1 + ord("z"), math.nan, 1.0) * (labels_BTA != IGNORED_LABEL)

    place = "text 1" if apart else "the stream of documents"
    with pytest.raises(NotFiniteError, match=f"{place}: the log-likelihood of the text is nan"):
        text_loss(Scorer(token_nll, 4), Characters(), ["abc", "abcdefghz", "z"], stride_tokens=4, apart=apart)


def test_a_perplexity_too_large_for_a_float_is_infinite():
    loss = text_loss(constant(800.0), Characters(), ["abc"], stride_tokens=8)
    assert loss.perplexity == math.inf
    assert math.isclose(loss.bits_per_byte, 800 / math.log(2))
