"""Hugging Face folders in and out: a configuration and the parameters, `config.json` and safetensors.

The parameters have Hugging Face's names already (see `model.transformer`), so what is left is to map the configuration
and to refuse what one side cannot express: a key that changes what the model computes is never passed over.
Transformers itself is not needed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.size import parameter_shapes
from model.transformer import ModelConfig

TRAITS = ("norm", "norm_position", "qk_norm", "sub_norm")
"""The fields that a family fixes, and its `config.json` does not mention."""

FAMILIES: dict[str, tuple[Any, ...]] = {
    "llama": ("rmsnorm", "pre", "none", False),
    "olmo": ("layernorm-nonparametric", "pre", "none", False),
    "olmo2": ("rmsnorm", "post", "full", False),
    "bitnet": ("rmsnorm", "pre", "none", True),
    "qwen3": ("rmsnorm", "pre", "head", False),
    "mistral": ("rmsnorm", "pre", "none", False),  # last: what it can express is written as llama
}
"""`model_type` of each family, and the values of its traits."""

CLASS_PREFIXES = {"llama": "Llama", "olmo": "Olmo", "olmo2": "Olmo2", "bitnet": "BitNet", "qwen3": "Qwen3"}

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
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}

# Keys that change what is computed in a way that the model does not have, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "clip_qkv": (None,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
}

DERIVED = "rotary_emb.inv_freq"
"""End of the names of a buffer that old Llama folders hold and every program computes."""

MAX_SHARD_BYTES = 5 * 10**9


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Map a `config.json` of the families llama, mistral, olmo, olmo2, bitnet and qwen3.

    Raises ValueError with one line for each key whose value the model cannot express.
    """
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not known; {', '.join(FAMILIES)} are")
    given = DEFAULTS | FAMILY_DEFAULTS.get(family, {}) | dict(hf_config)
    rope = dict(given.get("rope_parameters") or {})  # Transformers 5 keeps the rotary settings in here
    given["rope_theta"] = rope.pop("rope_theta", given["rope_theta"])
    problems = [
        f"{key} {given[key]!r}: the model has only {values[0]!r}"
        for key, values in NEUTRAL.items()
        if key in given and given[key] not in values
    ]
    if rope.pop("rope_type", "default") != "default" or rope:
        problems.append(f"rope_parameters {given['rope_parameters']!r}: only rope_type 'default' is there")
    if given["hidden_act"] not in ("silu", "relu2"):
        problems.append(f"hidden_act {given['hidden_act']!r}: only silu and relu2 are there")
    slides = given.get("sliding_window") is not None and given.get("use_sliding_window", family == "mistral")
    if slides and given["sliding_window"] < given.get("max_position_embeddings", 0):
        problems.append(f"sliding_window {given['sliding_window']}: attention here always sees the whole sequence")
    other_layers = set(given.get("layer_types") or ()) - {"full_attention"}
    if other_layers:
        problems.append(f"layer_types {', '.join(sorted(other_layers))}: only full_attention is there")
    missing = [key for key in FIELD_KEYS.values() if key not in given]
    if missing:
        problems.append(f"{', '.join(missing)}: missing")
    if problems:
        raise ValueError("this config.json cannot be expressed:\n" + "\n".join(f"  {line}" for line in problems))
    fields = {field: given[key] for field, key in FIELD_KEYS.items()} | dict(zip(TRAITS, FAMILIES[family], strict=True))
    fields["rope_theta"] = float(fields["rope_theta"])
    if family == "olmo":
        fields["norm_eps"] = OLMO_EPS
    return ModelConfig(**fields)


def config_to_hf(
    config: ModelConfig,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Map to the `config.json` of the one family that computes the same.

    Raises ValueError if there is none.
    """
    traits = tuple(getattr(config, trait) for trait in TRAITS)
    family = next((family for family, values in FAMILIES.items() if values == traits), None)
    if family is None:
        combination = ", ".join(f"{trait} {value}" for trait, value in zip(TRAITS, traits, strict=True))
        raise ValueError(f"no Hugging Face family has {combination}; these have others: {', '.join(CLASS_PREFIXES)}")
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
    if family == "olmo":
        del hf_config["rms_norm_eps"]
    return {
        "architectures": [f"{CLASS_PREFIXES[family]}ForCausalLM"],
        "model_type": family,
        **hf_config,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
    }


def load_hf(folder: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Open a folder with `config.json` and one or several safetensors files.

    The second result yields each parameter's name and value, read when it is asked for, in the dtype it is stored in;
    `dict` of it is a state dict. Names and shapes have been checked by then, for all files.

    Raises ValueError, naming all of them, where tensors are missing, unknown or of another shape than `config.json`
    says, and FileNotFoundError where a file is missing.
    """
    from safetensors import safe_open

    folder = Path(folder)
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    stored: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _safetensors_files(folder):
        with safe_open(path, framework="pt") as file:
            stored |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    stored = {name: found for name, found in stored.items() if not name.endswith(DERIVED)}
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)  # Transformers ties it whatever it holds
    _check_shapes({name: shape for name, (_, shape) in stored.items()}, config, str(folder))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in sorted({path for path, _ in stored.values()}):
            with safe_open(path, framework="pt") as file:
                for name in (name for name in stored if stored[name][0] == path):
                    yield name, file.get_tensor(name)

    return config, tensors()


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} points outside of its folder: {', '.join(outside)}")
    return [folder / name for name in names]


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    expected = parameter_shapes(config)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"not in the model: {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"shape: {name} is {found[name]} and must be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{where} does not hold the model:\n" + "\n".join(f"  {line}" for line in problems))


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens: `config.json` and safetensors.

    `tensors` are the parameters by name, all of one dtype, which is the one that is written. A file holds at most
    `max_shard_bytes` unless one tensor alone is larger; more than one file come with an index.

    Raises ValueError where no family has this configuration, or where tensors are missing, unknown, of another shape or
    of several dtypes.
    """
    from safetensors.torch import save_file

    hf_config = config_to_hf(config, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, "what is to be saved")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the tensors have several dtypes, {', '.join(dtypes)}; cast them to one")
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in parameter_shapes(config):
        if shards[-1] and tensors[name].nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensors[name].nbytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps({**hf_config, "torch_dtype": dtypes[0]}, indent=2) + "\n")
