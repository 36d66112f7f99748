"""Documents of a row that do not see each other."""

import pytest
import torch
from models import build, every_variant, random_tokens
from torch import Tensor

from model.config import ModelConfig
from model.documents import documents_of
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import quantize_

FIRST = 5
STARTS = (0, 3, 4, 17)
"""Where documents begin in the second row; the first row has one in the middle of it."""
LENGTH = 24


def rows() -> Tensor:
    """Two rows of tokens; no document begins by chance."""
    tokens = random_tokens(2, LENGTH, seed=1)
    tokens[tokens == FIRST] = FIRST + 1
    tokens[0, 11] = FIRST
    tokens[1, list(STARTS)] = FIRST
    return tokens


def masked(config: ModelConfig, precision: str) -> Transformer:
    model = build(config).double()
    if precision == "ternary":
        quantize_(model, QuantConfig())
    model.model.first_token = FIRST
    return model


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits is not None
    return logits


def test_positions_and_what_a_token_sees() -> None:
    positions_BT, mask_B1TT = documents_of(torch.tensor([[1, 2, FIRST, 3, FIRST, FIRST, 4]]), FIRST)
    assert positions_BT.tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    seen = [[sorted(row.nonzero().flatten().tolist()) for row in mask_B1TT[0, 0]]]
    assert seen == [[[0], [0, 1], [2], [2, 3], [4], [5], [5, 6]]]


@every_variant
@pytest.mark.parametrize("precision", ["16-bit", "ternary"])
def test_logits_do_not_depend_on_neighbors(config: ModelConfig, precision: str) -> None:
    model, tokens = masked(config, precision), rows()
    before = logits_of(model, tokens)
    for place in range(LENGTH):
        if place in STARTS:
            continue
        begin = max(start for start in STARTS if start <= place)
        end = min([start for start in STARTS if start > place], default=LENGTH)
        changed = tokens.clone()
        changed[1, place] = (tokens[1, place] + 1) % 90 + 6
        after = logits_of(model, changed)
        own = torch.zeros(LENGTH, dtype=torch.bool)
        own[place:end] = True
        assert torch.equal(after[1, ~own], before[1, ~own])
        assert not torch.equal(after[1, place], before[1, place])
        assert begin <= place < end
        assert torch.equal(after[0], before[0])


@every_variant
def test_a_document_in_a_row_is_as_it_is_alone(config: ModelConfig) -> None:
    model, tokens = masked(config, "16-bit"), rows()
    together = logits_of(model, tokens)
    for begin, end in zip(STARTS, (*STARTS[1:], LENGTH), strict=True):
        torch.testing.assert_close(
            together[1, begin:end], logits_of(model, tokens[1:, begin:end])[0], rtol=0, atol=1e-12
        )
    model.model.first_token = None
    assert not torch.allclose(logits_of(model, tokens)[1, STARTS[1] :], together[1, STARTS[1] :], atol=1e-3)


def test_gradients_stay_within_a_document() -> None:
    model, tokens = masked(ModelConfig(**SMALL), "16-bit"), rows() % 32
    tokens[tokens == FIRST] = FIRST + 1
    tokens[:, 0], tokens[:, 12] = FIRST, FIRST
    embedded: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_()))
    labels = tokens.clone()
    labels[:, :12] = -100
    loss = model(tokens, labels).loss
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert gradient[:, :12].abs().max() == 0
    assert gradient[:, 12:].abs().amax(-1).min() > 0


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
    "tie_embeddings": False,
}  # fmt: skip


def test_one_document_is_a_row_as_ever() -> None:
    """Positions from 0 and a causal mask: the same function, to the last bits."""
    model = build(ModelConfig(**SMALL)).double()
    tokens = random_tokens(3, 20) % 32
    tokens[tokens == FIRST] = FIRST + 1
    tokens[:, 0] = FIRST
    before = logits_of(model, tokens)
    model.model.first_token = FIRST
    torch.testing.assert_close(logits_of(model, tokens), before, rtol=0, atol=1e-12)


def test_generation_with_a_cache_continues_one_document() -> None:
    model = build(ModelConfig(**SMALL)).double()
    model.model.first_token = FIRST
    tokens = torch.tensor([[FIRST, 7, 8, 9]])
    cache = model.new_cache(1, 8)
    stepwise = [model.next_logits(tokens[:, place : place + 1], cache) for place in range(4)]
    torch.testing.assert_close(stepwise[-1], logits_of(model, tokens)[:, -1], rtol=0, atol=1e-12)
