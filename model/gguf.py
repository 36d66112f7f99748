"""Describe the architecture for llama.cpp: the graph that computes the same, with its names and keys.

Its graphs (github.com/ggml-org/llama.cpp, `src/models`) fix more than a GGUF file says: the activation, which norms
there are, whether the head is the embedding. A tensor that a graph does not know stops the loading, a different
activation stops nothing, so what a graph computes differently is refused here. Nothing but names and numbers is
needed for that: neither llama.cpp nor the `gguf` package.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.gguf_rope import rope_fields, rope_problem, scaling_from_gguf
from model.hf import FAMILIES, LARGEST, TRAITS

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = ("llama", "bitnet", "qwen2", "qwen3", "olmo", "olmo2")
"""Graphs that are written for; each has the name of the family in Hugging Face, and its traits."""

ROTATES_NEIGHBOURS = ("llama", "olmo")
"""Graphs whose rotary positions turn the pairs (2 i, 2 i + 1) of a head; the others (i, i + E / 2), as the model."""

ROTATED = re.compile(r"\.[qk]_proj\.(weight|bias)$")
"""Parameters whose rows become those of heads that are rotated."""

HEADS_AS_WIDE_AS_HIDDEN = ("bitnet", "qwen2", "olmo", "olmo2")
"""Graphs without a head width of their own."""

BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "input_layernorm": "attn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_architecture(config: ModelConfig) -> str:
    """The graph that computes what the model does.

    Raises:
        ValueError: there is none; says why.
    """
    traits = tuple(getattr(config, trait) for trait in TRAITS)
    name = next((name for name in ARCHITECTURES if FAMILIES[name] == traits), None)
    if name is None:
        combination = ", ".join(f"{trait} {value}" for trait, value in zip(TRAITS, traits, strict=True))
        raise ValueError(f"llama.cpp has no graph with {combination}; its graphs are {', '.join(ARCHITECTURES)}")
    if config.activation != "silu":
        raise ValueError(
            f"llama.cpp's graph {name} always computes SiLU and would load a model with activation "
            f"{config.activation} without a word, and be wrong"
        )
    if name == "bitnet" and not config.tie_embeddings:
        raise ValueError("llama.cpp's graph bitnet (SubLN) uses the embedding as its head, but this model has another")
    heads = config.num_heads * config.head_width
    if name in HEADS_AS_WIDE_AS_HIDDEN and heads != config.hidden_size:
        raise ValueError(
            f"llama.cpp's graph {name} has no head width of its own: num_heads * head_dim is {heads} and must be "
            f"hidden_size {config.hidden_size}"
        )
    if problem := rope_problem(config, name):
        raise ValueError(problem)
    return name


def gguf_metadata(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys of a GGUF file that describe the model.

    Raises:
        ValueError: as `gguf_architecture`.
    """
    name = gguf_architecture(config)
    eps = "layer_norm_epsilon" if config.norm == "layernorm-nonparametric" else "layer_norm_rms_epsilon"
    values: dict[str, int | float | str] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_sequence_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        f"attention.{eps}": float(config.norm_eps),
        "rope.dimension_count": config.head_width,
        "rope.freq_base": float(config.rope_theta),
    }
    values |= rope_fields(config)
    return {f"{name}.{key}": value for key, value in values.items()}


def gguf_name(name: str, config: ModelConfig) -> str:
    """Name of a parameter in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    if part == "post_attention_layernorm":
        return f"blk.{block}.{'ffn_norm' if config.norm_position == 'pre' else 'post_attention_norm'}.{kind}"
    return f"blk.{block}.{BLOCK_NAMES[part]}.{kind}"


def gguf_rows(values: "Tensor", name: str, config: ModelConfig) -> "Tensor":
    """Order the rows of a parameter as the graph wants them.

    Where neighbors are rotated, the two halves of each head of queries and keys are interleaved.

    Args:
        values: [O, I] of a projection, [O] of a bias; or anything that belongs to another parameter.
        name: of the parameter.
        config: of the model.
    """
    if gguf_architecture(config) not in ROTATES_NEIGHBOURS or not ROTATED.search(name):
        return values
    halves = values.unflatten(0, (-1, 2, config.head_width // 2))
    return halves.transpose(1, 2).reshape(values.shape)


def halves_of_rows(values: "Tensor", name: str, config: ModelConfig, architecture: str) -> "Tensor":
    """Undo `gguf_rows`, for a graph of this name."""
    if architecture not in ROTATES_NEIGHBOURS or not ROTATED.search(name):
        return values
    if len(values) % config.head_width:
        return values  # of another shape than the model's
    return values.unflatten(0, (-1, config.head_width // 2, 2)).transpose(1, 2).reshape(values.shape)


NOT_COMPUTED = ("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale")
"""Keys that change how a graph attends, unless they are 0."""


def config_from_gguf(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: "Tensor | None" = None
) -> ModelConfig:
    """The model that a GGUF file describes, undoing `gguf_metadata`.

    Args:
        fields: its keys and values.
        shapes: of its tensors, rows first.
        factors: its tensor `rope_freqs.weight`, if it has one.

    Raises:
        ValueError: none of `ARCHITECTURES`, or one that computes what the model does not; says why.
    """
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not known; {', '.join(ARCHITECTURES)} are")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ValueError("token_embd.weight is missing, or is no matrix")

    def field(key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = fields.get(f"{name}.{key}", default)
        if value is not None and type(value) not in kinds:
            raise ValueError(f"{name}.{key} {value!r:.40}: is no {kinds[0].__name__}")
        if isinstance(value, int | float) and not -LARGEST < value < LARGEST:
            raise ValueError(f"{name}.{key} {value!r:.40}: is no number of a model")
        return value

    if field("expert_count", (int,), 0):
        raise ValueError("it has experts, which is not computed here")
    for key in NOT_COMPUTED:
        if value := field(key, (float, int), 0):
            raise ValueError(f"{name}.{key} is {value}, which is not computed here; only 0 is read")
    traits = dict(zip(TRAITS, FAMILIES[name], strict=True))
    eps = "layer_norm_epsilon" if traits["norm"] == "layernorm-nonparametric" else "layer_norm_rms_epsilon"
    heads = field("attention.head_count", (int,))
    config: dict[str, Any] = {
        "vocab_size": embedding[0],
        "max_sequence_length": field("context_length", (int,)),
        "hidden_size": field("embedding_length", (int,)),
        "num_layers": field("block_count", (int,)),
        "intermediate_size": field("feed_forward_length", (int,)),
        "num_heads": heads,
        "num_kv_heads": field("attention.head_count_kv", (int,), heads),
        "norm_eps": field(f"attention.{eps}", (float, int), 1e-5),
    }
    if missing := [key for key, value in config.items() if value is None]:
        raise ValueError(f"keys for {', '.join(missing)} are missing")
    config |= {
        "head_dim": field("attention.key_length", (int,)),
        "rope_theta": field("rope.freq_base", (float, int), 10_000.0),
        "tie_embeddings": "output.weight" not in shapes,
    }
    try:
        model = ModelConfig(**config | traits)
    except ValueError as error:
        raise ValueError(f"its keys describe no model: {error}") from error
    window = field("attention.sliding_window", (int,), 0)
    if window and window < model.max_sequence_length:
        raise ValueError(
            f"{name}.attention.sliding_window is {window}: attention here always sees the whole sequence; 0 would be "
            f"right, or {name}.context_length, {model.max_sequence_length}, no larger than the window"
        )
    if field("rope.dimension_count", (int,), model.head_width) != model.head_width:
        raise ValueError("it rotates a part of each head, which is not computed here")
    return replace(model, rope_scaling=scaling_from_gguf(field, factors, model))
