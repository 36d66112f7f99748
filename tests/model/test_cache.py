"""A key-value cache changes nothing but the time: against the model without one."""

import pytest
import torch
from models import TINY, VARIANTS, build, random_tokens

from eval.sample import generate
from quant.config import BITNET
from quant.linear import quantize_
from quant.packed import freeze_

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def frozen(config, seed=0):
    model = build(config, seed)
    quantize_(model, BITNET)
    freeze_(model)
    return model


@every_variant
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 1, 1, 4), (12,)], ids=str)
def test_logits_are_those_of_the_whole_sequence(config, chunks):
    """To rounding, in fp64: what attention and products with other shapes add in another order."""
    model, tokens_BT = build(config).double(), random_tokens(3, 12)
    with torch.no_grad():
        expected_BTV = model(tokens_BT).logits
    cache, end = model.new_cache(3, 12), 0
    for length in chunks:
        end += length
        logits_BV = model.next_logits(tokens_BT[:, end - length : end], cache)
        torch.testing.assert_close(logits_BV, expected_BTV[:, end - 1], rtol=0, atol=1e-13)
    assert cache.num_tokens == 12


@every_variant
@pytest.mark.parametrize("build_model", [build, frozen], ids=["16-bit", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_greedy_tokens_are_those_without_a_cache(config, build_model, dtype):
    model = build_model(config).to(dtype)
    prompt = random_tokens(4).tolist()
    tokens = list(prompt)
    for _ in range(24):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(generate(model, prompt, max_tokens=24, temperature=0)) == tokens[4:]


def test_a_full_cache_and_a_full_context_are_told():
    model = build(TINY)
    cache = model.new_cache(1, 4)
    model.next_logits(random_tokens(1, 3), cache)
    with pytest.raises(ValueError, match="room for 4 tokens, but 5 are needed"):
        model.next_logits(random_tokens(1, 2), cache)
    cache = model.new_cache(1, 64)
    model.next_logits(random_tokens(1, 30), cache)
    with pytest.raises(ValueError, match="a sequence has 33 tokens, but max_sequence_length is 32"):
        model.next_logits(random_tokens(1, 3), cache)
