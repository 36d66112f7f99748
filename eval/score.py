"""Turn log-likelihoods of answers into scores with standard errors.

Accuracy takes the answer with the largest log-likelihood, length-normalized accuracy the one with the largest per
character of the answer, as OLMo's in-loop evaluation and lm-evaluation-harness do. F1 is that of one answer. The
bits per byte of the right answer (arXiv 2101.00027, section 3.1) need no comparison of answers, and tell models apart
where accuracy is still at chance.

Standard errors are over examples: of a mean that of the sample, of F1 by linearisation. Five of the eleven tasks have
56 to 500 examples; their accuracies are certain to 2 to 7 points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

POSITIVE = "yes"
"""The answer that F1 is of."""


@dataclass(frozen=True)
class Answered:
    """An example with the log-likelihoods that a model gives its answers."""

    answers: tuple[str, ...]
    """The text that is scored, without the space before it."""
    gold: int
    """Index of the right one."""
    log_likelihoods: tuple[float, ...]
    """Of the answers, in nats."""

    @property
    def chosen(self) -> int:
        """The answer with the largest log-likelihood; the first of equals."""
        return max(range(len(self.answers)), key=self.log_likelihoods.__getitem__)

    @property
    def chosen_by_length(self) -> int:
        """The answer with the largest log-likelihood per character."""
        return max(range(len(self.answers)), key=lambda n: self.log_likelihoods[n] / len(self.answers[n]))

    @property
    def gold_bits_per_byte(self) -> float:
        """Of the right answer."""
        return -self.log_likelihoods[self.gold] / math.log(2) / len(self.answers[self.gold].encode())


@dataclass(frozen=True)
class Score:
    """A score and its standard error (NaN where a single example, or none, says nothing of it)."""

    value: float
    standard_error: float


def scores_of(examples: Sequence[Answered], metric: str) -> dict[str, Score]:
    """The scores of a task: of its metric (`acc`, `acc_norm` or `f1`), and `bits_per_byte`."""
    if metric == "f1":
        score = f1(examples)
    elif metric == "acc_norm":
        score = mean([float(example.chosen_by_length == example.gold) for example in examples])
    else:
        score = mean([float(example.chosen == example.gold) for example in examples])
    return {metric: score, "bits_per_byte": mean([example.gold_bits_per_byte for example in examples])}


def mean(values: Sequence[float]) -> Score:
    """The mean, and the sample's standard deviation over the root of its size."""
    size = len(values)
    middle = math.fsum(values) / size
    if size == 1:
        return Score(middle, math.nan)
    variance = math.fsum((value - middle) ** 2 for value in values) / (size - 1)
    return Score(middle, math.sqrt(variance / size))


def f1(examples: Sequence[Answered]) -> Score:
    """F1 of the answer `POSITIVE`: 2 TP / (2 TP + FP + FN), 0 where nothing is positive.

    It is a ratio of sums over examples, whose error is that of the sum of (numerator - F1 * denominator) over the sum
    of denominators.
    """
    terms = []
    for example in examples:
        is_positive = example.answers[example.gold] == POSITIVE
        said_positive = example.answers[example.chosen] == POSITIVE
        terms.append((2.0 * (is_positive and said_positive), float(is_positive) + float(said_positive)))
    total = math.fsum(below for _, below in terms)
    if not total:
        return Score(0.0, math.nan)
    value = math.fsum(above for above, _ in terms) / total
    residue = math.fsum((above - value * below) ** 2 for above, below in terms)
    size = len(examples)
    return Score(value, math.sqrt(residue * size / (size - 1)) / total if size > 1 else math.nan)
