"""Scaled rotary frequencies: Transformers' own functions are the oracle, bit for bit."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, build, random_tokens

from model.config import RopeScalingConfig
from model.hf import config_from_hf, config_to_hf
from model.rotary import rotary_frequencies, rotary_tables
from model.transformer import ModelConfig

PUBLISHED = {
    "Llama-3.1-8B": (128, 131072, 5e5, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "Llama-3.2-1B": (64, 131072, 5e5, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "Qwen3-8B": (128, 131072, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "Qwen2.5-7B, before": (128, 32768, 1e6, {"type": "yarn", "factor": 4.0, "rope_type": "yarn"}),
    "yarn with mscale": (64, 4096 * 40, 1e4, {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707,
                                              "beta_fast": 32, "beta_slow": 1,
                                              "original_max_position_embeddings": 4096}),
    "yarn without truncation": (64, 131072, 15e4, {"rope_type": "yarn", "factor": 32.0, "truncate": False,
                                                   "original_max_position_embeddings": 4096}),
    "yarn with its own factor": (32, 256, 1e4, {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5,
                                                "beta_fast": 0, "original_max_position_embeddings": 128}),
    "yarn at one place": (8, 64, 1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2}),
    "Vicuna-16k": (128, 16384, 1e4, {"type": "linear", "factor": 4.0, "rope_type": "linear"}),
    "default": (64, 2048, 1e4, {"rope_type": "default"}),
}  # fmt: skip
"""Width of a head, context, base and scaling."""


def hf_config(head_dim, context, theta, scaling):
    sizes = {"vocab_size": 96, "hidden_size": head_dim, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"head_dim": head_dim, "intermediate_size": 8, "max_position_embeddings": context, "rope_theta": theta}
    return {"model_type": "llama", **sizes, "rope_scaling": scaling}


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_frequencies_are_those_of_transformers(transformers, published):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(**hf_config(*published))
    config = config_from_hf(json.loads(json.dumps(hf_config(*published))))
    rope_type = published[3]["rope_type"]
    if rope_type in ROPE_INIT_FUNCTIONS:  # not `default` in version 5
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](theirs, "cpu")
        assert torch.equal(rotary_frequencies(config, torch.device("cpu")), frequencies)
        assert (config.rope_scaling.attention_scale if config.rope_scaling else 1.0) == factor
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    for first in (0, 1000):
        cos, sin = rotary(torch.zeros(1), torch.arange(first, first + 60)[None])
        ours = rotary_tables(config, 60, torch.device("cpu"), first)
        assert torch.equal(ours[0], cos[0])
        assert torch.equal(ours[1], sin[0])
    again = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert again == replace(config, num_kv_heads=1)
    written = transformers.LlamaConfig(**config_to_hf(config))
    assert torch.equal(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(written).inv_freq, rotary.inv_freq)


SCALED = {
    "linear": RopeScalingConfig(method="linear", factor=4.0),
    "llama3": RopeScalingConfig(method="llama3", factor=8.0, original_max_sequence_length=8),
    "yarn": RopeScalingConfig(method="yarn", factor=4.0, original_max_sequence_length=16, beta_fast=4.0),
}


@pytest.mark.parametrize("scaling", SCALED.values(), ids=SCALED)
def test_a_cache_and_documents_see_the_same_positions(scaling):
    model = build(replace(TINY, rope_theta=100.0, rope_scaling=scaling))
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        logits = model(tokens).logits
        unscaled = build(replace(TINY, rope_theta=100.0))(tokens).logits
        assert not torch.allclose(logits, unscaled, atol=1e-3)
        cache = model.new_cache(2, 24)
        model.next_logits(tokens[:, :9], cache)
        for place in range(9, 24):
            torch.testing.assert_close(model.next_logits(tokens[:, place : place + 1], cache), logits[:, place])
        # A document alone has the logits that it has in a row of several, at its own positions.
        row = torch.cat([tokens[:, :10], tokens[:, :14]], dim=1)
        row[:, [0, 10]] = 95
        model.model.first_token = 95
        apart = model(row).logits
        model.model.first_token = None
        torch.testing.assert_close(apart[:, :10], model(row[:, :10]).logits)
        torch.testing.assert_close(apart[:, 10:], model(row[:, 10:]).logits)


def test_scaled_positions_are_those_of_a_longer_sequence():
    """Linear scaling by 4 puts token 4 t where token t was."""
    config = replace(TINY, max_sequence_length=64)
    scaled = replace(config, rope_scaling=SCALED["linear"])
    plain = rotary_tables(config, 16, torch.device("cpu"))
    every_fourth = [table[::4] for table in rotary_tables(scaled, 64, torch.device("cpu"))]
    torch.testing.assert_close(every_fourth, list(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic': it changes the frequencies as a sequence grows"),
        ({"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}, "not known"),
        ({"rope_type": "longrope"}, "rope_type 'longrope': it has other frequencies for short sequences"),
        ({"rope_type": "su"}, "'su': it is not known; linear, llama3, yarn are computed here"),
        ({"rope_type": ["yarn"]}, "is no name"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "rope_type 'yarn' and type 'linear'"),
        ({"rope_type": "yarn"}, "of rope_type yarn must have factor"),
        ({"rope_type": "linear"}, "of rope_type linear must have factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor '2': is no number"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor is 0.5; must be 1 or more"),
        ({"rope_type": "linear", "factor": True}, "factor True: is no number"),
        ({"rope_type": "llama3", "factor": 8.0}, "llama3 must have original_max_position_embeddings, low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4,
             "original_max_position_embeddings": 8},
            r"rope_scaling.high_freq_factor is 4.0; must be above low_freq_factor 4.0",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate 1: is no true or false"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8.5}, "8.5: is no whole number"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "a", "mscale_all_dim": 1}, "mscale 'a' and mscale_all_dim 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "heads are rotated as a whole"),
        ({"full_attention": {"rope_type": "default"}}, "has full_attention: not known; the model has one setting"),
        ({"rope_type": "default", "mrope_section": [1]}, "has mrope_section: not known"),
        ("linear", "must hold a JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_in_a_sentence(rope, message):
    for name in ("rope_scaling", "rope_parameters"):
        given = {key: value for key, value in hf_config(8, 64, 1e4, None).items() if key != "rope_scaling"}
        with pytest.raises(ValueError, match=message.replace("rope_scaling", name)):
            config_from_hf({**given, name: rope})


def test_settings_that_two_versions_read_differently_are_refused():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    both = {**hf_config(8, 64, 1e4, yarn), "rope_parameters": {**yarn, "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters differ"):
        config_from_hf(both)
    inner = hf_config(8, 64, 1e4, {"type": "linear", "factor": 2.0, "rope_theta": 5e5})
    with pytest.raises(
        ValueError, match=r"rope_scaling has rope_theta 500000\.0, and the model 10000\.0: Transformers"
    ):
        config_from_hf(inner)
    assert config_from_hf({**inner, "rope_theta": 5e5}).rope_theta == 5e5
    with pytest.raises(ValueError, match="original_max_position_embeddings is 64 beside rope_scaling and 32 in it"):
        config_from_hf({**hf_config(8, 64, 1e4, yarn), "original_max_position_embeddings": 64})


def test_version_5s_settings_are_read_from_one_place():
    given = hf_config(8, 64, 1e4, None)
    del given["rope_theta"]
    config = config_from_hf({**given, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScalingConfig(method="linear", factor=2.0)


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"method": "linear", "factor": 0.5}, {"factor": "is 0.5; must be 1 or more"}),
        ({"method": "llama3", "factor": 2.0}, {"original_max_sequence_length": "is missing; llama3 needs it"}),
        ({"method": "linear", "factor": 2.0, "beta_fast": 8.0},
         {"beta_fast": "is 8.0, which linear does not use; leave it out"}),
        ({"method": "yarn", "factor": 2.0, "original_max_sequence_length": 8, "beta_slow": 40.0},
         {"beta_fast": "is 32.0; must be above beta_slow 40.0"}),
        ({"method": "yarn", "factor": 2.0, "original_max_sequence_length": 8, "attention_factor": 0.0},
         {"attention_factor": "is 0.0; must be above 0"}),
    ],
)  # fmt: skip
def test_a_configuration_checks_itself(values, problems):
    with pytest.raises(ValueError, match="is") as caught:
        RopeScalingConfig(**values)
    assert caught.value.args[0] == problems


def test_yarn_needs_a_base_above_1():
    with pytest.raises(ValueError, match=r"must be above 1 with rope_scaling.method yarn"):
        replace(TINY, rope_theta=1.0, rope_scaling=SCALED["yarn"])


NUMBERS = st.sampled_from([None, True, 0, -1, 1, 3, 10**400, 0.5, 4.0, math.nan, math.inf, "", [1]])
TYPES = st.sampled_from(["linear", "llama3", "yarn"])


@given(
    method=TYPES,
    change=st.dictionaries(
        st.sampled_from(["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
                         "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim",
                         "rope_theta"]),
        NUMBERS, max_size=4,
    ),
)  # fmt: skip
def test_any_setting_gives_finite_frequencies_or_one_error(method, change):
    sound = {"rope_type": method, "factor": 2.0, "original_max_position_embeddings": 32}
    sound |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if method == "llama3" else {}
    try:
        config = config_from_hf(hf_config(8, 64, 1e4, sound | change))
    except ValueError as error:
        assert isinstance(error.args[0], str)  # noqa: PT017
    else:
        assert isinstance(config, ModelConfig)
        assert rotary_frequencies(config, torch.device("cpu")).isfinite().all()


def test_a_family_whose_settings_cannot_hold_it_is_not_written():
    olmo2 = replace(TINY, norm_position="post", qk_norm="full")
    assert config_to_hf(replace(olmo2, rope_scaling=SCALED["linear"]))["rope_scaling"] == {
        "type": "linear",
        "factor": 4,
    }
    with pytest.raises(ValueError, match="method yarn: olmo2 in Transformers 4 knows only linear"):
        config_to_hf(replace(olmo2, rope_scaling=SCALED["yarn"]))
