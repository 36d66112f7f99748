"""A model as lm-evaluation-harness asks it: log-likelihoods, log-likelihoods of whole texts, generated answers.

Texts become tokens as its own `hf` model makes them (pinned: 0.4.13), by the tokenizer that Transformers has for the
model: so a token is put in front of a text if, and only if, that tokenizer does, and the names of special tokens in a
chat are those tokens. To lm-evaluation-harness every rank seems to be alone; ranks share the work below it
(`eval.rows.Scorer`, `Writer`), so that each of them has all answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from data.errors import DataError
from eval.errors import NotFiniteError
from eval.rows import Scorer, continuation_rows

MAX_NEW_TOKENS = 256
"""If a task does not say, as in lm-evaluation-harness."""
UNDERSTOOD = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
"""What a task may say of generation, after `normalize_gen_kwargs`."""


@dataclass(frozen=True)
class Writer:
    """A model that continues prompts, which the ranks divide among themselves.

    Each prompt is a batch of its own, so that no text depends on other prompts or on the number of ranks.
    """

    continued: Callable[..., Iterator[int]]
    """`eval.sample.generate` of the model: tokens after a prompt."""
    ready: Callable[[], AbstractContextManager[object]]
    """Entered by all ranks together around the work, in which no rank waits for another."""
    rank: int = 0
    world_size: int = 1
    reduce_sum: Callable[[Tensor], object] = lambda tensor: None
    """Sums a tensor over all ranks in place."""

    def write(
        self,
        prompts: Sequence[tuple[list[int], dict[str, Any], Callable[[list[int]], bool]]],
        advance: Callable[[int], None] = lambda num_prompts: None,
    ) -> list[list[int]]:
        """The tokens after each prompt; a collective that is given the same prompts.

        Args:
            prompts: tokens, the options of `eval.sample.generate`, and whether to stop after the tokens so far.
            advance: called with the prompts finished since the last call, as far as this rank knows.
        """
        most = max((options["max_tokens"] for _, options, _ in prompts), default=0)
        written = torch.zeros(len(prompts), 1 + most, dtype=torch.int64)  # the number of tokens, and these
        with self.ready():
            for number in range(self.rank, len(prompts), self.world_size):
                prompt, options, is_done = prompts[number]
                tokens: list[int] = []
                for token in self.continued(prompt, **options):
                    tokens.append(token)
                    if is_done(tokens):
                        break
                written[number, : 1 + len(tokens)] = torch.tensor([len(tokens), *tokens])
                advance(min(self.world_size, len(prompts) - number))
        self.reduce_sum(written)
        return [row[1 : 1 + row[0]] for row in written.tolist()]


class HarnessModel(TemplateLM):
    """A model with its tokenizer.

    Args:
        scorer: gives log-likelihoods, with `token_nll_and_misses`.
        writer: generates.
        tokenizer: Transformers' one.
        end_tokens: tokens that end what is generated.
        add_bos_token: whether a token is put in front of each text; None leaves it to the tokenizer.
    """

    def __init__(
        self,
        scorer: Scorer,
        writer: Writer,
        tokenizer: Any,
        end_tokens: Sequence[int],
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        self._scorer, self._writer = scorer, writer
        self.end_tokens = frozenset(end_tokens)
        """Tokens that end what is generated."""
        self.tokenizer, self._add_bos_token = tokenizer, add_bos_token
        self.advance: Callable[[int], None] = lambda num_finished: None
        """Called with the number of requests, or of windows, finished since the last call."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a continuation without a context."""
        first: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Not used: requests are not cached."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt; templates that know no system role get none, as in lm-evaluation-harness."""
        import jinja2

        def rendered(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return rendered(chat_history)
        except jinja2.exceptions.TemplateError:
            return rendered([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts in front of a text, unless it is there already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, self._add_bos_token if add_special_tokens is None else add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(text, **options)
        return tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding would write them; a collective.

        Raises:
            DataError: a continuation has no token.
            NotFiniteError: a log-likelihood is NaN or infinite.
        """
        for request in requests:
            context, continuation = request.args
            if not continuation or (not context and not self._encode(continuation, False)):
                raise DataError(f"{_origin(request)}: the continuation {continuation!r} has no token")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        for request, (value, _) in zip(requests, found, strict=True):
            _check_finite(value, request)
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        rows = []
        for texts, context, continuation in requests:
            if not continuation:
                raise DataError(f"the continuation {texts[1]!r} has no token of its own after {texts[0][-20:]!r}")
            context = context or [self.prefix_token_id]
            rows.append(continuation_rows(context, continuation, self._scorer.window_tokens))
        flat = iter(self._scorer.greedy_log_likelihoods([row for pieces in rows for row in pieces], self.advance))
        found = []
        for pieces in rows:
            values = [next(flat) for _ in pieces]
            found.append((sum(value for value, _ in values), all(is_greedy for _, is_greedy in values)))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, each in windows of its own; a collective.

        Raises:
            NotFiniteError: a log-likelihood is NaN or infinite.
        """
        window_tokens = self._scorer.window_tokens
        rows = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, window_tokens, context_len=1)
            pairs = map(make_disjoint_window, windows)
            rows.append([row for before, after in pairs for row in continuation_rows(before, after, window_tokens)])
        flat = iter(self._scorer.log_likelihoods([row for pieces in rows for row in pieces], self.advance))
        found = [sum(next(flat) for _ in pieces) for pieces in rows]
        for request, value in zip(requests, found, strict=True):
            _check_finite(value, request)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generated answers, cut before the first of the stop sequences; a collective.

        Raises:
            DataError: a task asks for what is not supported, or the model's context is too short for the answer.
        """
        prompts, stops = [], []
        for number, request in enumerate(requests):
            prompt, options, until = self._prompt_of(request)
            prompts.append((prompt, options | {"seed": number}, self._stopping(until)))
            stops.append(until)
        written = self._writer.write(prompts, self.advance)
        return [
            postprocess_generated_text(
                self.tokenizer.decode(tokens, skip_special_tokens=True), stop=until, think_end_token=None
            )
            for tokens, until in zip(written, stops, strict=True)
        ]

    def _prompt_of(self, request: Any) -> tuple[list[int], dict[str, Any], list[str]]:
        """The tokens of a prompt, options of `eval.sample.generate`, and the stop sequences."""
        context, given = request.args
        said: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
        if said.get("num_beams") == 1:  # a single one is greedy
            del said["num_beams"]
        if unknown := said.keys() - UNDERSTOOD:
            raise DataError(f"{_origin(request)}: generates with {', '.join(sorted(unknown))}, which is not supported")
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(said["until"], eos=eos)
        max_tokens, window_tokens = said["max_gen_toks"], self._scorer.window_tokens
        if max_tokens >= window_tokens:
            raise DataError(
                f"{_origin(request)}: may generate {max_tokens} tokens, which leaves no room for the question in the "
                f"model's context of {window_tokens}"
            )
        has_first = has_bos_prefix(context, getattr(self.tokenizer, "bos_token", None))
        tokens = self._encode(context, False if has_first else self._add_bos_token)
        options = {
            "max_tokens": max_tokens,
            "temperature": said.get("temperature", 0.0) if said["do_sample"] else 0.0,
            "top_p": said.get("top_p", 1.0),
        }
        return (tokens or [self.prefix_token_id])[-(window_tokens - max_tokens) :], options, until

    def _stopping(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether tokens end a text: with a token that ends it, or with a stop sequence, as for the `hf` model."""
        criteria = stop_sequences_criteria(self.tokenizer, until, 0, 1)

        def is_done(tokens: list[int]) -> bool:
            if tokens[-1] in self.end_tokens:
                return True
            tokens_1T = torch.tensor([tokens])
            return any(bool(each(tokens_1T, None)) for each in criteria)

        return is_done


def _origin(request: Any) -> str:
    return f"{request.task_name}, example {request.doc_id + 1}"


def _check_finite(value: float, request: Any) -> None:
    if not isfinite(value):
        raise NotFiniteError(f"{_origin(request)}: the log-likelihood is {value}")
