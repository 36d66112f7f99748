"""Connect models to lm-evaluation-harness (pinned: 0.4.13), and its tasks to Tritrain's scorer.

`HarnessModel` is what that calls a model: any of its tasks that compares log-likelihoods runs on one. It needs no more
of the model than `eval.rows.Scorer` has. To lm-evaluation-harness every rank seems to be alone; ranks share the work
below it, so that each of them has all answers.
"""

import logging
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

from lm_eval.api.model import TemplateLM

from data.tokenizer import Tokenizer
from eval.rows import Scorer, continuation_rows
from eval.score import Answered
from eval.tasks import harness_task

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that brings its own data


class HarnessModel(TemplateLM):
    """A model with its tokenizer.

    Args:
        scorer: the model.
        tokenizer: its tokenizer; adds no token in front of a context, as OLMo's and, but for models that say otherwise,
            lm-evaluation-harness's own do not.
        separately: tokenize contexts and continuations apart, as OLMo does; or else a continuation has the tokens that
            are left when those of the context are taken from those of both together.
        advance: called with the number of requests finished since the last call.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        separately: bool = False,
        advance: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        super().__init__()
        self._scorer, self._encode, self._separately, self._advance = scorer, tokenizer.encode, separately, advance
        self._end_of_document = tokenizer.end_of_document

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it precedes a continuation without a context."""
        return self._end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are never added."""
        return self._encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._separately:
            return self._encode(context), self._encode(continuation)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, Any]]:
        """Log-likelihoods; whether a continuation is the likeliest of all is not looked at, and None stands for it."""
        rows = [
            continuation_rows(context, continuation, self._scorer.window_tokens)
            for _, context, continuation in requests
        ]
        found = iter(self._scorer.log_likelihoods([row for pieces in rows for row in pieces], self._advance))
        return [(sum(next(found) for _ in pieces), None) for pieces in rows]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not supported: `eval.perplexity` measures texts."""
        raise NotImplementedError("perplexity of texts is measured by `tritrain perplexity`")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not supported."""
        raise NotImplementedError("tasks with generated answers are not supported; choose multiple-choice tasks")


def ask(task: Any, model: TemplateLM) -> list[Answered]:
    """Score a model on the examples of a multiple-choice task of lm-evaluation-harness."""
    examples = list(task.eval_docs)
    requests = [
        task.construct_requests(example, task.fewshot_context(example, num_fewshot=0), metadata=(task.task_name, n, 1))
        for n, example in enumerate(examples)
    ]
    answers = model.loglikelihood([request for group in requests for request in group], disable_tqdm=True)
    bounds = pairwise(accumulate(map(len, requests), initial=0))
    delimiter = len(task.config.target_delimiter)
    return [
        Answered(
            answers=tuple(request.args[1][delimiter:] for request in group),
            gold=task.doc_to_text(example) if task.multiple_input else task.doc_to_target(example),
            log_likelihoods=tuple(found for found, _ in answers[first:last]),
        )
        for example, group, (first, last) in zip(examples, requests, bounds, strict=True)
    ]


def answer_rows(
    label: str,
    rows: list[dict[str, Any]],
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    separately: bool,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> list[Answered]:
    """Score a model on the examples of `eval.tasks.load_rows`; a collective."""
    model = HarnessModel(scorer, tokenizer, separately=separately, advance=advance)
    return ask(harness_task(label, rows), model)
