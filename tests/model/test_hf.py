import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, VARIANTS

from model.hf import FIELD_KEYS, config_from_hf, config_to_hf
from model.size import num_parameters
from model.transformer import ModelConfig

NEEDED_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_configuration_survives_the_round_trip(config):
    config = replace(config, init_std=0.03)
    explicit = replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == explicit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; llama, olmo"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias True: the model has only False"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only silu and relu2"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types sliding_attention",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_position_embeddings": 8192}, "sliding_window 4096"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, r"'smollm3' is not known.*NoPE"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\]"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"vocab_size": "many", "hidden_size": 32.0}, "(?s)vocab_size 'many': is no int.*hidden_size 32.0: is no int"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5 does not divide hidden_size 32"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "(?s)attention_bias.*hidden_act"),
    ],
)
def test_what_the_model_cannot_express_is_refused(change, message):
    hf_config = {**config_to_hf(VARIANTS["llama"]), **change}
    hf_config = {key: value for key, value in hf_config.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf_config)


def test_keys_that_change_nothing_are_accepted():
    hf_config = config_to_hf(VARIANTS["llama"])
    del hf_config["rope_theta"]
    neutral = {
        "model_type": "mistral",
        "sliding_window": 4096,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "clip_qkv": None,
        "transformers_version": "5.0.0",
    }
    config = config_from_hf({**hf_config, **neutral})
    assert config == replace(VARIANTS["llama"], rope_theta=1e6, head_dim=8)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Olmo", "Olmo2", "BitNet", "Qwen2", "Qwen3"])
def test_absent_keys_mean_what_they_mean_in_transformers(transformers, family):
    hf_config = getattr(transformers, f"{family}Config")()
    whole = hf_config.to_dict()
    whole["sliding_window"] = None
    sparse = {key: whole[key] for key in NEEDED_KEYS} | {"sliding_window": None}
    assert config_from_hf(sparse) == replace(
        config_from_hf(whole),
        num_kv_heads=config_from_hf(sparse).num_kv_heads,
        head_dim=config_from_hf(sparse).head_dim,
    )
    assert config_from_hf(sparse).kv_heads == config_from_hf(whole).kv_heads
    assert config_from_hf(sparse).head_width == config_from_hf(whole).head_width


PUBLISHED = {
    "SmolLM2-135M": (
        134_515_008,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}


@pytest.mark.parametrize(("size", "hf_config"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_their_published_sizes(size, hf_config):
    assert num_parameters(config_from_hf(hf_config)) == size


def test_combinations_without_a_family_are_refused():
    with pytest.raises(ValueError, match="no Hugging Face family has norm layernorm-nonparametric, norm_position post"):
        config_to_hf(VARIANTS["no-family"])
    with pytest.raises(ValueError, match="num_heads \\* head_dim is 64 and must be hidden_size 32"):
        config_to_hf(replace(VARIANTS["bitnet"], head_dim=16))
    with pytest.raises(ValueError, match="olmo in Hugging Face always has 1e-05"):
        config_to_hf(replace(VARIANTS["olmo"], norm_eps=1e-6))


SCALARS = st.sampled_from([None, True, 0, -1, 3, 10**400, 0.5, -1.0, math.nan, math.inf, "", "silu", "full_attention"])
JSON_VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "a"]), SCALARS)
OTHER_KEYS = ("model_type", "rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types")


@given(
    family=st.sampled_from(["llama", "mistral", "olmo", "olmo2", "bitnet", "qwen2", "qwen3"]),
    change=st.dictionaries(st.sampled_from([*FIELD_KEYS.values(), *OTHER_KEYS]), JSON_VALUES, max_size=3),
)
def test_any_value_is_a_model_or_one_error(family, change):
    try:
        config = config_from_hf({**config_to_hf(VARIANTS["llama"]), "model_type": family, **change})
    except ValueError as error:
        assert isinstance(error.args[0], str)  # noqa: PT017
    else:
        assert isinstance(config, ModelConfig)
