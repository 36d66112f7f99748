"""Documents of a row that do not see each other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import build, every_variant, random_tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import ModelConfig
from model.documents import BLOCK, attend, beginnings, block_mask, blocks_work, mask_of, plain_mask, positions
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
    first_BT = beginnings(torch.tensor([[1, 2, FIRST, 3, FIRST, FIRST, 4]]), FIRST)
    assert positions(first_BT).tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    mask_TT = plain_mask(first_BT, torch.float64)[0, 0]
    assert [row.isfinite().nonzero().flatten().tolist() for row in mask_TT] == [
        [0],
        [0, 1],
        [2],
        [2, 3],
        [4],
        [5],
        [5, 6],
    ]
    assert set(mask_TT.flatten().tolist()) == {0.0, -torch.inf}


@pytest.mark.parametrize("num_tokens", [BLOCK, 3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK - 1])
@pytest.mark.parametrize("per_document", [3, 100, 300, 10_000])
def test_blocks_are_those_that_a_token_sees(num_tokens: int, per_document: int) -> None:
    """The oracle is torch's own `create_block_mask`, which looks at every pair of tokens."""
    generator = torch.Generator().manual_seed(num_tokens + per_document)
    tokens = torch.where(torch.rand(3, num_tokens, generator=generator) * per_document < 1, FIRST, 0)
    tokens[0, [0, BLOCK - 1]] = FIRST
    first_BT = beginnings(tokens, FIRST)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (first_BT[row, query] == first_BT[row, key])

    found = block_mask(first_BT)
    expected = create_block_mask(sees, 3, None, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for counts in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, counts), getattr(expected, counts)), counts


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_blocks_attend_as_the_plain_mask_does(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.documents._compiled", lambda: flex_attention)
    tokens = torch.zeros(2, 2 * BLOCK + 3, dtype=torch.int64)
    tokens[0, [7, 8, BLOCK]], tokens[1, 200] = FIRST, FIRST
    first_BT = beginnings(tokens, FIRST)
    q, k, v = (
        torch.randn(2, num, tokens.shape[1], 16, generator=torch.Generator().manual_seed(num))
        for num in (4, kv_heads, kv_heads)
    )
    bias = plain_mask(first_BT, q.dtype)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, block_mask(first_BT)), expected, rtol=0, atol=1e-5)


def test_blocks_of_each_batch_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.documents.blocks_work", lambda *_: True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model, plain = build(ModelConfig(**SMALL)), build(ModelConfig(**SMALL))
    model.model.first_token = plain.model.first_token = FIRST
    for block in model.model.layers:
        block.compile(backend=backend)
    for seed in range(3):
        tokens = random_tokens(2, BLOCK, seed=seed) % 32
        found = logits_of(model, tokens)
        with monkeypatch.context() as patch:
            patch.setattr("model.documents.blocks_work", lambda *_: False)
            torch.testing.assert_close(found, logits_of(plain, tokens), rtol=0, atol=1e-5)
    assert len(graphs) == 1


def test_blocks_are_compiled_whatever_is_forced_to_be_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is evaluated would have T x T scores of every head."""
    graphs = CompileCounter()
    monkeypatch.setattr("model.documents._compiled", lambda: torch.compile(flex_attention, backend=graphs))
    q = torch.randn(1, 2, BLOCK, 16)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        attend(q, q, q, block_mask(torch.zeros(1, BLOCK, dtype=torch.int64)))
        assert graphs.frame_count == 1
        torch.compile(torch.neg, backend=graphs)(q)
        assert graphs.frame_count == 1


def test_a_processor_has_the_plain_mask() -> None:
    first_BT = torch.zeros(1, BLOCK, dtype=torch.int64)
    assert isinstance(mask_of(first_BT, torch.float32, (4, 2, 16)), Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (2, 1, 16)])
def test_blocks_work_on_a_gpu(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Values and gradients, compared with a plain mask where a run begins."""
    assert blocks_work(torch.device("cuda"), dtype, heads)
    mask = mask_of(torch.zeros(1, 2 * BLOCK, dtype=torch.int64, device="cuda"), dtype, heads)
    assert isinstance(mask, BlockMask)


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
