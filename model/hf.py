"""Convert Hugging Face's `config.json` to a `ModelConfig` and back.

The parameters have Hugging Face's names already (see `model.transformer`), so what is left is to map the configuration
and to refuse what one side cannot express: a key that changes what the model computes is never passed over.
Transformers itself is not needed.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.hf_rope import rope_from_hf, rope_to_hf

TRAITS = ("norm", "norm_position", "qk_norm", "sub_norm", "qkv_bias")
"""The fields that a family fixes, and its `config.json` does not mention."""

FAMILIES: dict[str, tuple[Any, ...]] = {
    "llama": ("rmsnorm", "pre", "none", False, False),
    "olmo": ("layernorm-nonparametric", "pre", "none", False, False),
    "olmo2": ("rmsnorm", "post", "full", False, False),
    "bitnet": ("rmsnorm", "pre", "none", True, False),
    "qwen2": ("rmsnorm", "pre", "none", False, True),
    "qwen3": ("rmsnorm", "pre", "head", False, False),
    "mistral": ("rmsnorm", "pre", "none", False, False),  # last: what it can express is written as llama
}
"""`model_type` of each family, and the values of its traits."""

CLASS_PREFIXES = {
    "llama": "Llama",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "bitnet": "BitNet",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

OLMO_EPS = 1e-5
"""The number in the source of Transformers' OLMo, which its `config.json` does not hold."""

FIELD_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
}
KINDS = {"activation": str, "norm_eps": float, "rope_theta": float, "tie_embeddings": bool, "init_std": float}
"""What the fields that are no whole numbers are."""
LARGEST = 2**40
"""No number of a model is larger."""

# What Transformers assumes for a key that is absent, where that is not an error here. Not every folder has every key.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "num_key_value_heads": None,
    "head_dim": None,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "olmo2": {"rms_norm_eps": 1e-5},
    "bitnet": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "relu2", "num_key_value_heads": 5},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}

# Keys that change what is computed in a way that the model does not have, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "clip_qkv": (None,),
    "compression_config": (None,),
    "input_bits": (None, 16, 32),
    "mlp_bias": (False, None),
    "no_rope_layers": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "weight_bits": (None, 16, 32),
}


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Map a `config.json` of the families llama, mistral, olmo, olmo2, bitnet, qwen2 and qwen3.

    Raises ValueError with one line for each key whose value the model cannot express, or that is no value for it.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        reason = f"model_type {family!r} is not known; {', '.join(FAMILIES)} are"
        if "no_rope_layers" in hf_config:
            reason += ". Its layers without rotary positions (no_rope_layers, NoPE) are not in the model"
        if str(family).startswith("gemma"):
            reason += (
                ". Gemma scales its embeddings, adds 1 to the weights of norms and gates by GELU, as no model here"
            )
        raise ValueError(reason)
    given = DEFAULTS | FAMILY_DEFAULTS.get(family, {}) | dict(hf_config)
    problems = [
        f"{key} {given[key]!r}: the model has only {values[0]!r}"
        for key, values in NEUTRAL.items()
        if key in given and given[key] not in values
    ]
    scaling = None
    values = _value_problems(given)
    problems += values
    if not values:
        try:
            given["rope_theta"], scaling = rope_from_hf(given)
        except ValueError as error:
            problems += str(error).splitlines()
    window = given.get("sliding_window")
    slides = window is not None and given.get("use_sliding_window", family == "mistral")
    if slides and not problems and (type(window) is not int or window < given["max_position_embeddings"]):
        problems.append(
            f"sliding_window {window!r}: attention here always sees the whole sequence; null would be right, "
            "or max_position_embeddings no larger than the window"
        )
    layer_types = given.get("layer_types")
    others = (
        {str(each) for each in layer_types} if isinstance(layer_types, list) else {str(layer_types or "full_attention")}
    )
    if others := others - {"full_attention"}:
        problems.append(f"layer_types {', '.join(sorted(others))}: only full_attention is supported")
    if not problems:
        fields = {field: given[key] for field, key in FIELD_KEYS.items()}
        fields |= {field: float(fields[field]) for field, kind in KINDS.items() if kind is float}
        fields |= dict(zip(TRAITS, FAMILIES[family], strict=True)) | {"rope_scaling": scaling}
        if family == "olmo":
            fields["norm_eps"] = OLMO_EPS
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            problems = [f"{FIELD_KEYS[field]}: {problem}" for field, problem in error.args[0].items()]
    raise ValueError("this config.json is not supported:\n" + "\n".join(f"  {line}" for line in problems))


def _value_problems(given: Mapping[str, Any]) -> list[str]:
    """What is missing, and what is of another type than its field."""
    missing = [key for key in FIELD_KEYS.values() if key not in given]
    problems = [f"{', '.join(missing)}: missing"] if missing else []
    for field, key in FIELD_KEYS.items():
        value: Any = given.get(key)
        kind = KINDS.get(field, int)
        if key in missing or (value is None and DEFAULTS.get(key, "") is None):
            continue
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind in (int, float) and not -LARGEST < value < LARGEST):
            problems.append(f"{key} {value!r}: is no {kind.__name__}")
    if given["hidden_act"] not in ("silu", "relu2"):
        problems.append(f"hidden_act {given['hidden_act']!r}: only silu and relu2 are supported")
    return problems


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """Map to the `config.json` of the one family that computes the same.

    Raises ValueError if there is none.
    """
    traits = tuple(getattr(config, trait) for trait in TRAITS)
    family = next((family for family, values in FAMILIES.items() if values == traits), None)
    if family is None:
        combination = ", ".join(f"{trait} {value}" for trait, value in zip(TRAITS, traits, strict=True))
        raise ValueError(f"no Hugging Face family has {combination}; known families are {', '.join(CLASS_PREFIXES)}")
    heads = config.num_heads * config.head_width
    if family in ("olmo", "olmo2", "bitnet") and heads != config.hidden_size:
        raise ValueError(
            f"{family} in Hugging Face has no head_dim of its own: "
            f"num_heads * head_dim is {heads} and must be hidden_size {config.hidden_size}"
        )
    if family == "olmo" and config.norm_eps != OLMO_EPS:
        raise ValueError(f"norm_eps {config.norm_eps}: olmo in Hugging Face always has {OLMO_EPS}")
    hf_config = {key: getattr(config, field) for field, key in FIELD_KEYS.items()}
    hf_config |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
    if config.rope_scaling is not None:
        hf_config["rope_scaling"] = rope_to_hf(config.rope_scaling, family)
    if family == "olmo":
        del hf_config["rms_norm_eps"]
    if family != "qwen2":
        hf_config["attention_bias"] = False
    return {
        "architectures": [f"{CLASS_PREFIXES[family]}ForCausalLM"],
        "model_type": family,
        **hf_config,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
    }
