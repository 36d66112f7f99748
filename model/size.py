"""Compute the size of a model from its configuration: parameters, FLOPs and activations.

Dimensions in names and formulas: T tokens of a sequence, D hidden, F intermediate, V vocabulary, L layers, H query
heads, K key-value heads, E width of a head.
"""

import re
from math import prod
from typing import Literal

from model.config import ModelConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `Transformer(config)`'s parameters, in the order of its `named_parameters()`."""
    D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_width
    H, K = config.num_heads, config.kv_heads
    block: dict[str, tuple[int, ...]] = {}

    def add_norm(name: str, width: int) -> None:
        if config.norm == "rmsnorm":
            block[f"{name}.weight"] = (width,)

    for projection, width in (("q_proj", H * E), ("k_proj", K * E), ("v_proj", K * E)):
        block[f"self_attn.{projection}.weight"] = (width, D)
        if config.qkv_bias:
            block[f"self_attn.{projection}.bias"] = (width,)
    block["self_attn.o_proj.weight"] = (D, H * E)
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        add_norm("self_attn.q_norm", E if per_head else H * E)
        add_norm("self_attn.k_norm", E if per_head else K * E)
    if config.sub_norm:
        add_norm("self_attn.attn_sub_norm", H * E)
    block |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    if config.sub_norm:
        add_norm("mlp.ffn_sub_norm", F)
    if config.norm_position == "pre":
        add_norm("input_layernorm", D)
    add_norm("post_attention_layernorm", D)
    if config.norm_position == "post":
        add_norm("post_feedforward_layernorm", D)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if config.norm == "rmsnorm":
        shapes["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def linear_shapes(config: ModelConfig, include: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all blocks' linear layers whose names match a regular expression, by parameter."""
    return {
        name: shape
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and is_in_block(name) and re.search(include, name.removesuffix(".weight"))
    }


def is_projection(name: str) -> bool:
    """Return whether a parameter of this name is the matrix of a block's linear layer."""
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS


def is_in_block(name: str) -> bool:
    """Return whether a parameter of this name belongs to one of the model's blocks."""
    return name.startswith("model.layers.")


def is_matrix(name: str, num_dimensions: int) -> bool:
    """Return whether a parameter is a matrix of a block, of those that Muon updates."""
    return num_dimensions == 2 and is_in_block(name)


def block_of(name: str) -> int:
    """Index of the block that a parameter belongs to, which must be in one."""
    return int(name.split(".")[2])


def num_parameters(config: ModelConfig) -> int:
    """All parameters; a tied embedding counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def num_linear_parameters(config: ModelConfig) -> int:
    """Parameters of the blocks' projections, biases apart: those that become ternary."""
    return sum(prod(shape) for name, shape in parameter_shapes(config).items() if is_projection(name))


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of training on one token, forward and backward, averaged over a sequence.

    The convention of PaLM (arXiv 2204.02311, appendix B), which follows Kaplan et al. (2001.08361): a product costs 2
    FLOPs for each multiply-add, the backward pass twice the forward pass, so 6 for each weight in a product. The head
    counts, also where it is tied; the embedding's look-up, norms and activations do not; nothing counts twice for being
    recomputed. Attention is counted as causal: a token sees (T + 1) / 2 others on average, itself included, and pays
    2 * 2 * E FLOPs a head for each in the forward pass. (PaLM counts all T of them: twice as much.)
    """
    weights = num_linear_parameters(config) + config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_width * (sequence_length + 1)
    return 6 * weights + 6 * attention


def activation_bytes(
    config: ModelConfig,
    micro_batch_sequences: int,
    sequence_length: int,
    bytes_per_element: int,
    checkpointing: bool,
    quantized: Literal["no", "ramp", "codes"],
) -> int:
    """Estimate what a forward pass keeps for its backward pass.

    With e bytes for each element a token leaves in a block, without compilation (a compiled block keeps less):
    - e * (H + 2 K) * E of rotated queries and keys and of values, 4 * H of softmax denominators;
    - e * H * E of attention's output, e * 3 F of the MLP's gate before and after the activation and of its other half;
    - the inputs of the projections, e * (2 D + F), for one copy serves all that read it, and o_proj reads attention's
      output; with a norm in front of it, its own input, e * H * E. A quantizer always gives it its own: 2 D + H * E + F
      of e bytes on a `ramp`, of one byte with 4 for the scale of each input where layers compute with `codes`;
    - for every norm of width W, 4 * W of the input in float32 and, if it has a weight, what that multiplies, e * W,
      or 4 * W in the families that round once.

    Behind the blocks stay the last norm, e * D of the gradient by the hidden states and 4 * V * D of that by the head
    (see `model.loss`). With checkpointing a block keeps its input, e * D, and one block at a time has all of the above.
    The chunk of logits comes and goes before the backward pass: `loss_chunk_tokens * V * (4 + e)` bytes on top,
    for that moment.
    """
    D, F, e = config.hidden_size, config.intermediate_size, bytes_per_element
    heads, kv_heads = config.num_heads * config.head_width, config.kv_heads * config.head_width
    norm_element = 4 if config.norm == "layernorm-nonparametric" else 4 + (4 if config.rounds_once else e)
    norm_width = 2 * D
    if config.qk_norm != "none":
        norm_width += heads + kv_heads
    if config.sub_norm:
        norm_width += heads + F
    own_inputs = 2 * D + heads + F
    inputs = {
        "no": e * (2 * D + F + (heads if config.sub_norm else 0)),
        "ramp": e * own_inputs,
        "codes": own_inputs + 4 * 4,
    }
    block_token = norm_element * norm_width + 4 * config.num_heads
    block_token += e * (2 * heads + 2 * kv_heads + 3 * F) + inputs[quantized]
    num_tokens = micro_batch_sequences * sequence_length
    block = num_tokens * block_token
    blocks = config.num_layers * num_tokens * e * D + block if checkpointing else config.num_layers * block
    return blocks + num_tokens * (norm_element + e) * D + 4 * config.vocab_size * D
