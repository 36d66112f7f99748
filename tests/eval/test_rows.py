"""Batches of fixed shapes: no score depends on what else is scored, in what order, or on how many ranks."""

import math
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VARIANTS, build

from eval.rows import IGNORED_LABEL, Row, Scorer, continuation_rows, padded_length
from quant.config import PRESETS
from quant.linear import quantize_

WINDOW = 96


def model_of(recipe, dtype):
    model = build(replace(VARIANTS["llama"], max_sequence_length=WINDOW)).to(dtype)
    if recipe:
        quantize_(model, PRESETS[recipe])
    return model


def scorer_of(model, **ranks):
    return Scorer(lambda tokens, labels: model(tokens, labels, reduction="none").token_nll, WINDOW, **ranks)


def random_rows(count, seed=0, vocab_size=96):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, WINDOW + 2, (), generator=generator))
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        scored = int(torch.randint(1, length, (), generator=generator))
        rows += continuation_rows(tokens[:-scored], tokens[-scored:], WINDOW)
    return rows


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_padded_length_holds_the_row_and_wastes_little(num_tokens, window):
    num_tokens = min(num_tokens, window)
    length = padded_length(num_tokens, window)
    assert num_tokens <= length <= window
    assert length - num_tokens < max(16, num_tokens / 2)


def test_few_lengths_are_there():
    lengths = {padded_length(n, 2048) for n in range(1, 2049)}
    assert sorted(lengths) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]


def test_rows_take_little_memory_for_a_run_keeps_those_of_its_tasks():
    tracemalloc.start()
    try:
        rows = [continuation_rows(range(1000, 1400), range(1400 + n, 1420 + n), 1024) for n in range(500)]
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes < 6 * 500 * 419, "four for each token, and something for each row; a tuple takes eight and more"
    assert rows[7][0].tokens == [*range(1000, 1400), *range(1407, 1426)]
    assert rows[7][0].labels == [IGNORED_LABEL] * 399 + [*range(1407, 1427)]


def test_continuation_counts_and_context_is_cut_from_the_left():
    assert continuation_rows([1, 2, 3], [4, 5], 10) == [Row.of([1, 2, 3, 4], [4, 5])]
    assert continuation_rows([1, 2, 3], [4, 5], 3) == [Row.of([2, 3, 4], [4, 5])]
    assert continuation_rows([1, 2, 3], [4, 5], 2) == [Row.of([3, 4], [4, 5])]
    for context, continuation in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="nothing to score"):
            continuation_rows(context, continuation, 2)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12))
def test_every_token_of_a_long_continuation_counts_once_behind_what_is_before_it(num_context, num_tokens, window):
    text = list(range(num_context + num_tokens))
    rows = continuation_rows(text[:num_context], text[num_context:], window)
    assert (len(rows) == 1) == (num_tokens <= window)
    counted = [label for row in rows for label in row.labels if label != IGNORED_LABEL]
    assert counted == text[num_context:]
    for number, row in enumerate(rows):
        assert 0 < len(row.tokens) == len(row.labels) <= window
        assert row.tokens == list(range(row.tokens[0], row.tokens[0] + len(row.tokens)))
        last = next(label for label in row.labels if label != IGNORED_LABEL)
        seen = last - row.tokens[0]
        assert seen >= min(last, window - window // 2 if number else 1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "recipe",
    [None, "bitnet-b1.58", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nielsen-2025", "quest"))],
)
def test_other_rows_change_no_bit_of_a_score(recipe, dtype):
    model = model_of(recipe, dtype)
    scorer, rows = scorer_of(model), random_rows(60)
    together = scorer.log_likelihoods(rows)
    assert scorer.log_likelihoods(rows[::-1])[::-1] == together
    assert [scorer.log_likelihoods([row])[0] for row in rows[:8]] == together[:8]
    assert scorer.log_likelihoods(rows[20:45]) == together[20:45]


def test_rows_of_the_same_tokens_are_run_once_and_change_no_bit():
    """Several labels for the same tokens, and rows that are there twice, among others."""
    model, rows = model_of("bitnet-b1.58", torch.bfloat16), random_rows(40)
    asked = [Row.of(row.tokens, [*row.labels[:-1], last]) for last in (1, 5, 9) for row in rows[:20:2]]
    asked += [rows[3], Row.of(rows[3].tokens, [IGNORED_LABEL] * len(rows[3].labels))]
    num_tokens = []

    def nll(tokens, labels):
        num_tokens.append(int((tokens != 0).any(1).sum()))
        return model(tokens, labels, reduction="none").token_nll

    told = []
    found = Scorer(nll, WINDOW).log_likelihoods([*rows, *asked], told.append)
    assert sum(num_tokens) == len(rows), "rows of tokens, none of which is run twice"
    assert sum(told) == len(rows) + len(asked)
    assert found == [scorer_of(model).log_likelihoods([row])[0] for row in [*rows, *asked]]
    assert found[-1] == 0


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_batches_and_change_no_bit(world_size):
    model, rows = model_of("bitnet-b1.58", torch.bfloat16), random_rows(200)
    parts, calls, told = [], [], []

    def nll(tokens, labels):
        calls[-1] += 1
        return model(tokens, labels, reduction="none").token_nll

    for rank in range(world_size):
        calls.append(0)
        told.append(0)

        def advance(count):
            told[-1] += count

        gathered = []
        scorer = Scorer(nll, WINDOW, rank=rank, world_size=world_size, reduce_sum=gathered.append)
        scorer.log_likelihoods(rows, advance)
        parts.append(gathered[0])
    assert torch.stack(parts).sum(0).tolist() == scorer_of(model).log_likelihoods(rows)
    assert sum(bool(part.any()) for part in parts) > 1, "one rank did all"
    assert len(set(calls)) == 1, "a sharded model needs every rank as often"
    assert told == [len(rows)] * world_size


def test_scores_are_those_of_a_plain_forward_pass():
    model = model_of(None, torch.float64)
    rows = random_rows(40)
    with torch.no_grad():
        for row, found in zip(rows, scorer_of(model).log_likelihoods(rows), strict=True):
            log_probabilities = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            expected = sum(
                log_probabilities[place, label].item()
                for place, label in enumerate(row.labels)
                if label != IGNORED_LABEL
            )
            assert math.isclose(found, expected, rel_tol=1e-9)


def test_shape_depends_on_the_length_alone():
    shapes = set()

    def nll(tokens, labels):
        shapes.add(tuple(tokens.shape))
        return torch.zeros(labels.shape)

    Scorer(nll, 6000).log_likelihoods([Row.of([1] * n, [1] * n) for n in (1, 16, 17, 5000, 6000)])
    assert shapes == {(256, 16), (128, 32), (1, 6000)}
    shapes.clear()
    Scorer(nll, 6000, batch_tokens=1024).log_likelihoods([Row.of([1] * n, [1] * n) for n in (1, 65, 6000)])
    assert shapes == {(64, 16), (10, 96), (1, 6000)}
