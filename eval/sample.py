"""Generate text: with a key-value cache or, if several ranks share the model, without one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from eval.errors import NotFiniteError
from model.cache import KeyValueCache
from model.transformer import Transformer


def generate(model: Transformer, prompt: Sequence[int], *, max_tokens: int = 256, **choice: Any) -> Iterator[int]:
    """Continue a prompt, token by token.

    Args:
        model: on any device, the whole of it.
        prompt: at least one token.
        max_tokens: how many to add at most.
        choice: ``end_tokens``, ``temperature``, ``top_p`` and ``seed``, see `continuation`.

    Raises:
        ValueError: the prompt fills the model's context; or a number is out of its range.
        NotFiniteError: the model's logits are NaN or infinite; raised when the token is due.
    """
    context_tokens, device = model.config.max_sequence_length, model.head.device
    cache: KeyValueCache | None = None

    def next_logits(tokens: Sequence[int]) -> Tensor:
        nonlocal cache
        cache = cache or model.new_cache(1, min(context_tokens, len(prompt) + max_tokens))
        new = tokens[cache.num_tokens :]
        return model.next_logits(torch.tensor([new], device=device), cache)[0]

    return continuation(next_logits, prompt, context_tokens, max_tokens=max_tokens, **choice)


def continuation(
    next_logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    context_tokens: int,
    *,
    max_tokens: int = 256,
    end_tokens: Collection[int] = (),
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt on whatever computes logits.

    It ends before an end token, after ``max_tokens``, or where the context is full.

    Args:
        next_logits: gives the logits [V] of the token that follows all tokens so far.
        prompt: at least one token.
        context_tokens: length of the context, including the continuation.
        max_tokens: how many to add at most.
        end_tokens: none to continue after every token.
        temperature: see `choose`.
        top_p: see `choose`.
        seed: of the choice.

    Raises:
        ValueError: the prompt fills the context; or a number is out of its range.
        NotFiniteError: logits are NaN or infinite; raised when the token is due.
    """
    if max_tokens < 1 or not 0 <= temperature < torch.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"max_tokens is {max_tokens}, temperature {temperature}, top_p {top_p}; they must be 1 or more, 0 or more, "
            "and above 0 and at most 1"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; must be a number of 64 bits")
    if len(prompt) >= context_tokens:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the model's context is {context_tokens}, including its answer"
        )
    max_tokens = min(max_tokens, context_tokens - len(prompt))
    tokens = _continuation(next_logits, prompt, max_tokens, temperature, top_p, seed)
    return takewhile(lambda token: token not in end_tokens, tokens)


def sample_tokens(
    logits_of: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    num_tokens: int,
    window_tokens: int,
    end_tokens: Collection[int],
    temperature: float = 0.7,
    seed: int = 0,
) -> list[int]:
    """Continue a prompt on a model that is being trained, by running the whole window again for every token.

    Every forward pass has the same shape, and there are always ``num_tokens`` of them, so that neither a compiled
    model nor several ranks that run it together notice what is sampled.

    Args:
        logits_of: gives the logits [1, window, V] of tokens [1, window].
        prompt: at least one token.
        num_tokens: how many to add.
        window_tokens: what the model sees at once; earlier tokens are left out.
        end_tokens: the continuation is cut before the first of them.
        temperature: see `choose`.
        seed: of the choice.

    Returns:
        The continuation, without the prompt.

    Raises:
        NotFiniteError: the model's logits are NaN or infinite.
    """

    def next_logits(tokens: Sequence[int]) -> Tensor:
        visible = tokens[-window_tokens:]
        padded = torch.zeros(1, window_tokens, dtype=torch.int64)
        padded[0, : len(visible)] = torch.tensor(visible)  # what comes after them cannot be seen: attention is causal
        return logits_of(padded)[0, len(visible) - 1]

    tokens = list(_continuation(next_logits, prompt, num_tokens, temperature, 1.0, seed))
    return list(takewhile(lambda token: token not in end_tokens, tokens))


def _continuation(
    next_logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    generator, tokens = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(choose(next_logits(tokens), temperature, top_p, generator))
        yield tokens[-1]


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits_V: of any dtype and device.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: only the likeliest tokens are kept, as many as together have this probability (arXiv 1904.09751, 3.1).
        generator: of the CPU, so that the choice is the same on every device.

    Raises:
        NotFiniteError: a logit is NaN or infinite.
    """
    logits_V = logits_V.float().cpu()
    if not logits_V.isfinite().all():
        raise NotFiniteError("the logits of the next token are not finite")
    if temperature == 0 or not (logits_V / temperature).isfinite().all():  # too small to divide by
        return int(logits_V.argmax())
    probabilities_V = (logits_V / temperature).softmax(-1)
    if top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        probability_before_V = sorted_V.cumsum(-1) - sorted_V
        probabilities_V[order_V[probability_before_V >= top_p]] = 0  # the first one is always kept
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def pieces_of_text(tokenizer: Tokenizer, tokens: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """The text of tokens as they come, each piece as soon as its characters are complete.

    A character may be several tokens, of a byte each. Decoders write bytes that are no character yet as U+FFFD, some
    of them with the whole characters before these, so all of these at the end wait for what comes next.

    Args:
        tokenizer: of the tokens.
        tokens: the continuation.
        prompt: what comes before them: a decoder may treat the first token of a text unlike others.
    """
    seen = list(prompt)
    written = len(tokenizer.decode(seen))
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen).rstrip("\ufffd")
        if len(text) > written:
            yield text[written:]
            written = len(text)
    if rest := tokenizer.decode(seen)[written:]:
        yield rest
