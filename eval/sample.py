"""Text that a model writes, by running the whole window again for every token: for a look, not for service."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sample_tokens(
    logits_of: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    num_tokens: int,
    window_tokens: int,
    end_token: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[int]:
    """Continue a prompt.

    Every forward pass has the same shape, and there are always ``num_tokens`` of them, so that neither a compiled
    model nor several ranks that run it together notice what is sampled.

    Args:
        logits_of: gives the logits [1, window, V] of tokens [1, window].
        prompt: at least one token.
        num_tokens: how many to add.
        window_tokens: what the model sees at once; earlier tokens are left out.
        end_token: the continuation is cut before it.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the choice.

    Returns:
        The continuation, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        visible = tokens[-window_tokens:]
        padded = torch.zeros(1, window_tokens, dtype=torch.int64)
        padded[0, : len(visible)] = torch.tensor(visible)  # what comes after them cannot be seen: attention is causal
        logits_V = logits_of(padded)[0, len(visible) - 1].float().cpu()
        if temperature == 0:
            tokens.append(int(logits_V.argmax()))
        else:
            probabilities_V = (logits_V / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    continuation = tokens[len(prompt) :]
    return continuation[: continuation.index(end_token)] if end_token in continuation else continuation
