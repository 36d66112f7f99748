"""A tiny model in every variant of the architecture."""

from dataclasses import replace

import pytest
import torch

from model.config import RopeScalingConfig
from model.init import initialize_
from model.transformer import ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=56,
    max_sequence_length=32,
    norm_eps=1e-6,
)
VARIANTS = {
    "llama": replace(TINY, num_kv_heads=2, tie_embeddings=False),
    "llama-wide-heads": replace(TINY, head_dim=12, rope_theta=500_000.0),
    "olmo": replace(TINY, norm="layernorm-nonparametric", norm_eps=1e-5),
    "olmo2": replace(TINY, num_kv_heads=1, norm_position="post", qk_norm="full", tie_embeddings=False),
    "bitnet": replace(TINY, num_kv_heads=2, sub_norm=True, activation="relu2"),
    "qwen2": replace(TINY, num_kv_heads=2, qkv_bias=True),
    "qwen3": replace(TINY, num_kv_heads=2, head_dim=16, qk_norm="head"),
    "llama-yarn": replace(
        TINY,
        num_kv_heads=2,
        tie_embeddings=False,
        rope_theta=100.0,
        rope_scaling=RopeScalingConfig(method="yarn", factor=4.0, original_max_sequence_length=8, beta_fast=4.0),
    ),
    "no-family": replace(TINY, norm="layernorm-nonparametric", qk_norm="head", sub_norm=True, norm_position="post"),
}
FAMILIES = {name: config for name, config in VARIANTS.items() if name != "no-family"}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with random norm weights and biases too, for ones and zeros would hide them."""
    model = Transformer(config)
    initialize_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
