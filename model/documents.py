"""Documents of a row that do not see each other: attention within each document, and positions from its beginning.

A row is a stretch of a stream in which each document follows the token that ends the one before. That token belongs to
the document that it precedes, as in a prompt: it sees nothing, and predicts the first token. The one before it has
predicted it. A row that begins in the middle of a document begins with position 0.

Chats may hold any token anywhere. There a token that begins a document comes as its complement, a negative number.

On a GPU, flex attention (arXiv 2412.05496) skips blocks of tokens that see nothing of one another. All its tensors have
shapes that do not depend on the documents, so that no step waits for the device; variable-length attention needs their
number and lengths. Flex attention is tried once for each shape of heads, and left out where it fails or gives other
values than a plain mask.

Dimensions: B sequences, T tokens, S tokens of a block, N = ceil(T / S), H query heads, K key-value heads, E width
of a head.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

MARKED = -1
"""In the place of the token with which documents begin: a token that begins one is its complement."""

BLOCK = 128
"""Tokens of a block: the kernels' own size."""

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_GRAPHS = 64
"""Graphs of flex attention, one for each shape and dtype, and with gradients or without."""

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-2}
"""Largest difference from a plain mask, relative to the largest value; float32 products may be those of TF32."""


def beginnings(tokens_BT: Tensor, first_token: int) -> Tensor:
    """The place at which each token's document begins, int64, `[B, T]`; found by a token or by marks."""
    is_first_BT = tokens_BT < 0 if first_token == MARKED else tokens_BT == first_token
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return torch.where(is_first_BT, places_T, 0).cummax(1).values


def positions(first_BT: Tensor) -> Tensor:
    """Of each token in its document, int64, `[B, T]`."""
    return torch.arange(first_BT.shape[1], device=first_BT.device) - first_BT


def plain_mask(first_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, `[B, 1, T, T]`: 0 for itself and tokens before it in its document, else -inf."""
    seen_BTT = (first_BT[:, :, None] == first_BT[:, None, :]).tril()
    # Added to scores: of a mask of true and false every layer would make, and keep, such a tensor of its own.
    bias_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=first_BT.device).masked_fill_(~seen_BTT, -torch.inf)
    return bias_BTT[:, None]


def block_mask(first_BT: Tensor) -> BlockMask:
    """The same for flex attention, from the blocks that each block of queries sees, without a tensor of T x T."""
    num_tokens = first_BT.shape[1]
    begins_N = torch.arange(0, num_tokens, BLOCK, device=first_BT.device)
    ends_N = (begins_N + BLOCK).clamp(max=num_tokens)
    # Beginnings only grow in a row, so those of a block's first and last token bound all.
    least_BN1, most_BN1 = first_BT[:, begins_N, None], first_BT[:, ends_N - 1, None]
    is_before_NN = (begins_N < begins_N[:, None]) & (ends_N - begins_N == BLOCK)[:, None]
    is_seen_BNN = (ends_N > least_BN1) & (begins_N <= begins_N[:, None])
    is_whole_BNN = (begins_N >= most_BN1) & is_before_NN

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_BT[row, query])

    parts, whole = _listed(is_seen_BNN & ~is_whole_BNN), _listed(is_whole_BNN)
    return BlockMask.from_kv_blocks(
        *parts, *whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


def _listed(is_chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are chosen, int32, `[B, 1, N]`, and the chosen ones before all others, int32, `[B, 1, N, N]`."""
    order = is_chosen_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return is_chosen_BNN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: BlockMask) -> Tensor:
    """Attention within the documents, `[B, H, T, E]`."""
    attention = cast(Callable[..., Tensor], flex_attention if torch.compiler.is_compiling() else _always_compiled)
    return attention(q_BHTE, k_BKTE, v_BKTE, block_mask=mask, enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1])


@torch.compiler.disable  # inside of what is compiled no stance can be set
def _always_compiled(*inputs: Tensor, **options: Any) -> Tensor:
    """Flex attention, compiled even where the caller forces all else to be eager: it has T x T scores of each head."""
    with torch.compiler.set_stance("default"):
        return _compiled()(*inputs, **options)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Beyond this limit it would be eager, without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(flex_attention, dynamic=False)


@cache
def blocks_work(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> bool:
    """Whether `attend` gives what a plain mask gives, values and gradients: tried on one row, and warned of if not.

    Args:
        device: of the model.
        dtype: of queries, keys and values.
        heads: H, K and E.
    """
    if device.type != "cuda" or dtype not in FUSED_DTYPES:
        return False
    H, K, E = heads
    generator = torch.Generator(device).manual_seed(0)
    first_BT = torch.zeros(1, 3 * BLOCK, dtype=torch.int64, device=device)
    first_BT[:, 50:], first_BT[:, 2 * BLOCK + 1 :] = 50, 2 * BLOCK + 1
    q, k, v, slope = (
        torch.randn(1, num, 3 * BLOCK, E, device=device, dtype=dtype, generator=generator) for num in (H, K, K, H)
    )

    def tried(attention: Callable[..., Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attention(*given)
            return [out.detach(), *torch.autograd.grad(out, given, slope)]

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plain_mask(first_BT, dtype))

    try:
        found = tried(lambda q, k, v: attend(q, k, v, block_mask(first_BT)))
    except Exception as error:  # whatever a compiler or a driver raises
        warnings.warn(f"flex attention fails for {heads} heads of {dtype}, and is not used: {error}", stacklevel=2)
        return False
    differences = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, tried(plainly), strict=True)]
    if max(differences) <= TOLERANCES[dtype]:
        return True
    warnings.warn(
        f"flex attention differs by {differences} for {heads} heads of {dtype}, and is not used", stacklevel=2
    )
    return False


def mask_of(first_BT: Tensor, dtype: torch.dtype, heads: tuple[int, int, int]) -> Tensor | BlockMask:
    """What `Attention` needs to keep documents apart; the arguments are those above."""
    if first_BT.shape[1] >= BLOCK and blocks_work(first_BT.device, dtype, heads):
        return block_mask(first_BT)
    return plain_mask(first_BT, dtype)
