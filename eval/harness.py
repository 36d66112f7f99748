"""Connect the eleven tasks of `eval.tasks`, as lm-evaluation-harness (pinned: 0.4.13) has them, to Tritrain's scorer.

`open_questions` turns the examples of a task into rows of tokens, and checks all of them before a model runs;
`answer_questions` scores a model on them. Neither needs more of the model than `eval.rows.Scorer` has. All other tasks
of lm-evaluation-harness: `eval.harness_tasks` and `eval.harness_model`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from lm_eval.api.model import TemplateLM

from data.errors import DataError
from data.tokenizer import Tokenizer
from eval.errors import NotFiniteError
from eval.rows import Row, Scorer, continuation_rows
from eval.score import Answered
from eval.tasks import harness_task

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that brings its own data


@dataclass(frozen=True)
class Encoding:
    """The tokens of a context and of a continuation.

    A context begins with the model's first token if its tokenizer puts that there, as Llama's ``<s>``, and as it does
    in lm-evaluation-harness. A token that no tokenizer puts there, as Qwen's, or that also ends documents, as OLMo's
    and that of models trained here, is put in front only where a continuation would have no context.
    """

    tokenizer: Tokenizer
    first_token: int
    """The token before a text."""
    separately: bool = False
    """Tokenize contexts and continuations separately, as OLMo does; otherwise a continuation has the tokens that are
    left when those of the context are taken from those of both together, as in lm-evaluation-harness."""
    puts_first_token: bool = False
    """Whether the tokenizer puts the first token in front of every text."""

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space in front of a text, as many of SentencePiece do.

        Separate continuations begin with a space; they have this one instead of it.
        """
        return int(self.tokenizer.token_bytes()[self.tokenizer.encode("a")].sum()) > len("a")

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both; those of a context are never empty."""
        encode = self.tokenizer.encode
        if self.separately:
            before = encode(context)
            after = encode(continuation.removeprefix(" ") if self._adds_space else continuation)
        else:
            question = context.rstrip()
            before = encode(question)
            after = encode(context + continuation)[len(before) :]
        begins = self.puts_first_token and self.first_token != self.tokenizer.end_of_document
        if begins or not before:
            before = [self.first_token, *before]
        return before, after


@dataclass(frozen=True)
class Question:
    """An example of a task, in tokens."""

    answers: tuple[str, ...]
    gold: int
    """Index of the right answer."""
    rows: tuple[tuple[Row, ...], ...]
    """Of each answer; see `eval.rows.continuation_rows`."""


def ask(task: Any, model: TemplateLM) -> list[Answered]:
    """Score a model on the examples of a multiple-choice task of lm-evaluation-harness."""
    examples = _requests_of(task)
    found = model.loglikelihood([request for *_, requests in examples for request in requests], disable_tqdm=True)
    bounds = pairwise(accumulate((len(requests) for *_, requests in examples), initial=0))
    return [
        Answered(answers, gold, tuple(value for value, _ in found[first:last]))
        for (answers, gold, _), (first, last) in zip(examples, bounds, strict=True)
    ]


def open_questions(label: str, rows: list[dict[str, Any]], encoding: Encoding, window_tokens: int) -> list[Question]:
    """Tokenize the examples of `eval.tasks.load_rows`.

    Args:
        label: the task's name, for messages.
        rows: its examples.
        encoding: how the model is asked.
        window_tokens: the longest row.

    Raises:
        DataError: an answer has no token of its own; says which.
    """
    questions = []
    for number, (answers, gold, requests) in enumerate(_requests_of(harness_task(label, rows)), start=1):
        pairs = [encoding.pair(*request.args) for request in requests]
        for answer, (_, after), request in zip(answers, pairs, requests, strict=True):
            if not after:
                raise DataError(
                    f"{label}, example {number}: the answer {answer!r} has no token of its own after "
                    f"{request.args[0][-20:]!r} with the tokenizer {encoding.tokenizer.path}; change the example"
                    + ("" if encoding.separately else ", or choose the task without -harness")
                )
        questions.append(
            Question(answers, gold, tuple(tuple(continuation_rows(*pair, window_tokens)) for pair in pairs))
        )
    return questions


def answer_questions(
    label: str, questions: Sequence[Question], scorer: Scorer, advance: Callable[[int], None] = lambda num_rows: None
) -> list[Answered]:
    """Score a model on the examples of a task; a collective.

    Args:
        label: the task's name, for messages.
        questions: of `open_questions`, with the scorer's window.
        scorer: the model.
        advance: called with the number of rows finished since the last call.

    Raises:
        NotFiniteError: a log-likelihood is NaN or infinite; names the first such example and its answer.
    """
    found = iter(_sums(scorer, [rows for question in questions for rows in question.rows], advance))
    answered = []
    for number, question in enumerate(questions, start=1):
        values = tuple(next(found) for _ in question.rows)
        for place, value in enumerate(values, start=1):
            if not math.isfinite(value):
                raise NotFiniteError(f"{label}, example {number}: the log-likelihood of answer {place} is {value}")
        answered.append(Answered(question.answers, question.gold, values))
    return answered


def _sums(scorer: Scorer, rows: Sequence[Sequence[Row]], advance: Callable[[int], None]) -> list[float]:
    """The log-likelihood of each continuation, which may have several rows."""
    found = iter(scorer.log_likelihoods([row for pieces in rows for row in pieces], advance))
    return [sum(next(found) for _ in pieces) for pieces in rows]


def _requests_of(task: Any) -> list[tuple[tuple[str, ...], int, list[Any]]]:
    """The answers, the index of the right one and the requests of each example of a task of lm-evaluation-harness."""
    delimiter = len(task.config.target_delimiter)
    examples = []
    for number, example in enumerate(task.eval_docs):
        context, about = task.fewshot_context(example, num_fewshot=0), (task.task_name, number, 1)
        requests = task.construct_requests(example, context, metadata=about)
        answers = tuple(request.args[1][delimiter:] for request in requests)
        gold = task.doc_to_text(example) if task.multiple_input else task.doc_to_target(example)
        examples.append((answers, gold, requests))
    return examples
