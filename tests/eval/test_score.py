"""Scores by hand, and as lm-evaluation-harness has them."""

import math

import pytest

from eval.score import Answered, Score, f1, mean, scores_of


def answered(log_likelihoods, gold, answers=None):
    answers = answers or tuple("abcdef"[: len(log_likelihoods)])
    return Answered(tuple(answers), gold, tuple(log_likelihoods))


def test_accuracy_takes_the_likeliest_answer_and_the_first_of_equals():
    examples = [answered([-1, -2], 0), answered([-1, -2], 1), answered([-3, -3], 0), answered([-3, -3, -1], 2)]
    score = scores_of(examples, "acc")["acc"]
    assert score.value == 0.75
    assert math.isclose(score.standard_error, math.sqrt(0.75 * 0.25 / 3))


def test_length_normalized_accuracy_divides_by_characters_not_bytes():
    long, short = "a long answer", "no"
    examples = [answered([-6.5, -2], gold, (long, short)) for gold in (0, 1)]
    assert [example.chosen for example in examples] == [1, 1]
    assert [example.chosen_by_length for example in examples] == [0, 0]
    assert scores_of(examples, "acc_norm")["acc_norm"].value == 0.5
    accented = answered([-4.1, -4.0], 0, ("éé", "e"))  # by bytes the second would win still more clearly
    assert accented.chosen_by_length == 0


def test_bits_per_byte_are_of_the_right_answer_in_utf8():
    example = answered([-1.0, -6 * math.log(2)], 1, ("no", "né"))
    assert math.isclose(example.gold_bits_per_byte, 2.0)
    assert math.isclose(scores_of([example, example], "acc")["bits_per_byte"].value, 2.0)
    assert scores_of([example, example], "acc")["bits_per_byte"].standard_error == 0


@pytest.mark.parametrize("answers", [("yes", "no"), ("no", "yes")])
def test_f1_is_that_of_yes_whatever_the_order(answers):
    yes, no = answers.index("yes"), answers.index("no")

    def example(gold, chosen):
        return answered([-1.0 if n == chosen else -2.0 for n in range(2)], gold, answers)

    examples = [example(yes, yes)] * 3 + [example(yes, no)] * 2 + [example(no, yes)] + [example(no, no)] * 4
    score = f1(examples)
    assert math.isclose(score.value, 2 * 3 / (2 * 3 + 1 + 2))
    # By hand: residues 2 - 2F three times, -F three times (2 missed, 1 wrong), 0 four times; sum of denominators 9.
    value = 6 / 9
    expected = math.sqrt((3 * (2 - 2 * value) ** 2 + 3 * value**2) * 10 / 9) / 9
    assert math.isclose(score.standard_error, expected)


def test_f1_without_any_positive_is_0():
    score = f1([answered([-1, -2], 0, ("no", "yes"))])
    assert score.value == 0
    assert math.isnan(score.standard_error)


def test_the_error_of_f1_is_that_of_resampling():
    """The linearisation against a bootstrap of 4,000 resamples."""
    import random

    rng = random.Random(0)
    examples = [
        answered([-1.0, -2.0] if rng.random() < 0.4 else [-2.0, -1.0], int(rng.random() < 0.6), ("no", "yes"))
        for _ in range(200)
    ]
    resampled = [f1(rng.choices(examples, k=len(examples))).value for _ in range(1000)]
    middle = sum(resampled) / len(resampled)
    spread = math.sqrt(sum((value - middle) ** 2 for value in resampled) / (len(resampled) - 1))
    assert math.isclose(f1(examples).standard_error, spread, rel_tol=0.1)


def test_errors_of_means_are_the_harness_s():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.25]
    assert math.isclose(mean(values).standard_error, metrics.mean_stderr(values))
    assert math.isnan(mean([1.0]).standard_error)
    assert mean([0.5, 0.5]) == Score(0.5, 0.0)
