import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, VARIANTS, build, every_variant, random_tokens
from torch._dynamo.testing import CompileCounterWithBackend

from model.rotary import rotary_tables, rotate
from model.transformer import RMSNorm, Transformer


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=8)
@given(position=st.integers(1, 15), seed=st.integers(0, 99))
def test_no_logit_depends_on_a_later_token(config, dtype, position, seed):
    model = build(config).to(dtype)
    tokens_BT = random_tokens(2, 16, seed=seed)
    changed_BT = tokens_BT.clone()
    changed_BT[:, position] = (changed_BT[:, position] + 1) % config.vocab_size
    with torch.no_grad():
        before_BTV, after_BTV = model(tokens_BT).logits, model(changed_BT).logits
    assert torch.equal(before_BTV[:, :position], after_BTV[:, :position])
    assert not torch.equal(before_BTV[:, position:], after_BTV[:, position:])


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_everything_follows_the_parameters_dtype(config, dtype):
    model = build(config).to(dtype)
    tokens_BT = random_tokens(2, 8)
    seen = set()
    for block in model.model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    assert model(tokens_BT).logits.dtype == dtype
    assert seen == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    loss = model(tokens_BT, tokens_BT).loss
    loss.backward()
    assert (loss.dtype, loss.shape) == (wide, ())
    nll_BT = model(tokens_BT, tokens_BT, reduction="none").token_nll
    assert (nll_BT.dtype, nll_BT.shape) == (wide, (2, 8))
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.abs().max() > 0, name


@every_variant
def test_loss_is_that_of_the_logits(config):
    model = build(replace(config, z_loss=0.1, loss_chunk_tokens=5)).double()
    tokens_BT, labels_BT = random_tokens(2, 8), random_tokens(2, 8, seed=1)
    labels_BT[0, 3] = labels_BT[1, 7] = -100
    logits_BTV = model(tokens_BT).logits
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
    torch.testing.assert_close(model(tokens_BT, labels_BT, reduction="none").token_nll, nll_BT)
    z = logits_BTV.logsumexp(-1)[labels_BT != -100].square().mean()
    expected = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT) + 0.1 * z
    torch.testing.assert_close(model(tokens_BT, labels_BT).loss, expected)


def test_gradients_agree_with_finite_differences():
    config = replace(
        VARIANTS["bitnet"],
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=6,
        vocab_size=7,
        qk_norm="full",
    )
    model = build(config).double()
    tokens_BT = random_tokens(1, 4) % 7
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens_BT, tokens_BT)).loss

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_grouped_queries_are_full_attention_with_repeated_heads():
    grouped = build(VARIANTS["qwen3"])
    full = Transformer(replace(grouped.config, num_kv_heads=4))
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(random_tokens(2, 8)), full(random_tokens(2, 8)))


def test_rotation_makes_products_depend_on_distance_alone():
    cos_TE, sin_TE = rotary_tables(TINY, 32, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()
    q_TE = rotate(q.expand(1, 1, 32, 8), cos_TE, sin_TE)[0, 0]
    k_TE = rotate(k.expand(1, 1, 32, 8), cos_TE, sin_TE)[0, 0]
    product_TT = q_TE @ k_TE.T
    for distance in range(-31, 32):
        diagonal = product_TT.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    torch.testing.assert_close(q_TE.norm(dim=-1), q.norm().expand(32), atol=1e-6, rtol=0)


def test_norms_round_like_their_family():
    x, weight = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    for config, expected in (
        (VARIANTS["llama"], weight[0] * wide.bfloat16()),
        (VARIANTS["olmo2"], (weight[0].float() * wide).bfloat16()),
    ):
        norm = RMSNorm(32, config).bfloat16()
        norm.weight.data = weight[0]
        assert torch.equal(norm(x), expected)


def test_there_are_no_buffers_for_the_meta_device_to_lose():
    with torch.device("meta"):
        model = Transformer(VARIANTS["bitnet"])
    assert not list(model.buffers())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_tied_head_is_the_embedding(tie):
    names = [name for name, _ in Transformer(replace(TINY, tie_embeddings=tie)).named_parameters()]
    assert names.count("lm_head.weight") == (0 if tie else 1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            config, id=name, marks=() if name in ("llama", "olmo2", "bitnet", "no-family") else pytest.mark.slow
        )
        for name, config in VARIANTS.items()
    ],
)
def test_blocks_compile_to_one_graph(config):
    model, compiled = build(config), build(config)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend=counter)
    tokens_BT = random_tokens(2, 8)
    for each in (model, compiled):
        each(tokens_BT, tokens_BT).loss.backward()
    assert counter.frame_count == 1
    assert list(compiled.state_dict()) == list(model.state_dict())
    for (name, expected), actual in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_blocks_compile_with_inductor():
    model, compiled = build(VARIANTS["bitnet"]), build(VARIANTS["bitnet"])
    torch._dynamo.reset()
    for block in compiled.model.layers:
        block.compile(fullgraph=True)
    tokens_BT = random_tokens(2, 8)
    for each in (model, compiled):
        each(tokens_BT, tokens_BT).loss.backward()
    for expected, actual in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="33 tokens, but max_sequence_length is 32"):
        Transformer(TINY)(random_tokens(1, 33))


def test_configuration_reports_all_problems_at_once():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        replace(TINY, hidden_size=100, num_heads=12, num_kv_heads=7)
    assert caught.value.args[0] == {
        "num_heads": "12 does not divide hidden_size 100 and head_dim is not set; choose 4, 5 or 10",
        "num_kv_heads": "7 does not divide num_heads 12; choose 3, 4 or 6",
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        replace(
            TINY,
            num_layers=0,
            num_kv_heads=0,
            z_loss=-1.0,
            norm_eps=0.0,
            sub_norm_init=-0.1,
            embedding_init_std=0.0,
            loss_chunk_tokens=-5,
        )
    assert set(caught.value.args[0]) == {
        *("num_layers", "num_kv_heads", "z_loss", "norm_eps"),
        *("sub_norm_init", "embedding_init_std", "loss_chunk_tokens"),
    }
    with pytest.raises(ValueError, match=r"head_dim.*7 is odd"):
        replace(TINY, head_dim=7)
    with pytest.raises(ValueError, match=r"4 does not divide hidden_size 16777213 .*; choose 1 or 16777213"):
        replace(TINY, hidden_size=2**24 - 3)  # a prime number
    with pytest.raises(ValueError, match=r"hidden_size.*1099511627777; must be 16777216 or less"):
        replace(TINY, hidden_size=2**40 + 1)


@pytest.mark.slow
def test_the_package_needs_torch_alone():
    program = """
import sys
BLOCKED = {"pydantic", "transformers", "safetensors", "deepspeed", "data", "quant", "launcher"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not for model/")
sys.meta_path.insert(0, Block())
import model.hf, model.init, model.loss, model.size, model.transformer
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
