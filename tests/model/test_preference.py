"""The loss of pairs against its formulas, with gradients, pair by pair in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import PreferenceConfig
from model.preference import Reference, by_side, chosen_labels, num_pairs, preference_loss, preferences

VOCAB, HIDDEN = 11, 6
DOCUMENTS = [[(5, 2), (4, 3), (3, 1), (6, 5), (1, 0)], [(9, 8), (7, 1), (1, 0), (1, 0), (1, 0)]]
"""Of each row, tokens of a document and how many of its last labels count; the last documents are padding."""


def batch() -> tuple[Tensor, Tensor]:
    """Tokens with complements, and labels, `[2, 19]`."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (2, 19))
    labels = torch.full_like(tokens, -100)
    for row, documents in enumerate(DOCUMENTS):
        at = 0
        for length, counted in documents:
            end = at + length
            labels[row, end - 1 - counted : end - 1] = tokens[row, end - counted : end]
            tokens[row, at] = ~tokens[row, at]
            at = end
        assert at == 19
    return tokens, labels


def reference_of(nll: Tensor, tokens: Tensor, config: PreferenceConfig) -> Reference:
    """From the reference's cross-entropy of every label; three pairs at most are in a row."""
    return Reference(-by_side(nll, tokens)[:, :3], config)


def by_hand(nll: Tensor, reference: Tensor, config: PreferenceConfig) -> list[Tensor]:
    """The margin of each pair."""
    margins = []
    for row, documents in enumerate(DOCUMENTS):
        gains, at = [], 0
        for length, counted in documents:
            part = slice(at, at + length)
            if counted:
                gain = (reference[row, part] - nll[row, part]).sum()
                gains.append(gain / counted if config.length_normalized else gain)
            at += length
        margins += [config.beta * (chosen - rejected) for chosen, rejected in zip(gains[::2], gains[1::2], strict=True)]
    return margins


@pytest.mark.parametrize("normalized", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(normalized: bool) -> None:
    tokens, labels = batch()
    config = PreferenceConfig(beta=0.7, length_normalized=normalized)
    hidden = torch.randn(38, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    reference = torch.rand(2, 19, dtype=torch.float64) * (labels != -100)
    loss, parts = preference_loss(hidden, weight, tokens, labels, 4, reference_of(reference, tokens, config))
    (3 * loss).backward()

    expected_hidden, expected_weight = (each.detach().clone().requires_grad_() for each in (hidden, weight))
    logits = expected_hidden @ expected_weight.t()
    nll = F.cross_entropy(logits, labels.flatten(), reduction="none").view(2, 19)
    margins = torch.stack(by_hand(nll, reference, config))
    assert len(margins) == 3 == num_pairs(tokens, labels)
    expected = -torch.log(torch.sigmoid(margins)).mean()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    torch.testing.assert_close(weight.grad, expected_weight.grad)
    assert parts.tolist() == pytest.approx(
        [expected.item(), margins.mean().item(), (margins > 0).double().mean().item()]
    )
    with torch.no_grad():
        without, _ = preference_loss(hidden, weight, tokens, labels, 4, reference_of(reference, tokens, config))
    torch.testing.assert_close(without, expected)


def test_a_model_that_is_its_reference_loses_log_two_and_rows_of_padding_count_nothing() -> None:
    tokens, labels = batch()
    nll = torch.rand(2, 19) * (labels != -100)
    loss, parts = preferences(nll, tokens, labels, reference_of(nll, tokens, PreferenceConfig()))
    assert loss.item() == pytest.approx(math.log(2))
    assert parts[1:].tolist() == [0, 0]
    loss, parts = preferences(nll, tokens, torch.full_like(labels, -100), reference_of(nll, tokens, PreferenceConfig()))
    assert loss.item() == 0
    assert parts.tolist() == [0, 0, 0]


def test_chosen_labels_are_those_of_every_other_document() -> None:
    tokens, labels = batch()
    counts = (chosen_labels(tokens, labels) != -100).sum(1).tolist()
    assert counts == [2 + 1, 8]
    assert (labels != -100).sum(1).tolist() == [2 + 3 + 1 + 5, 8 + 1]
