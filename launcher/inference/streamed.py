"""The loss of a published model on a few tokens, with one parameter, or one block, in memory at a time.

It is a forward pass in fp32 on the CPU, in which every parameter is read once: slower than a loaded model, and good for
a model of any size. Layers with codes compute with code times level, and round their inputs as the format says.
"""

from collections.abc import Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import CheckpointError
from launcher.formats.hf_source import EMBEDDING, HEAD
from launcher.formats.published import Coded, Published
from model.config import ModelConfig
from model.loss import token_nll
from model.rotary import rotary_tables
from model.transformer import NORMS, Block
from quant.config import Activations
from quant.rounding import quantize_activation

ROWS_AT_ONCE = 256
"""Rows of logits that exist at once."""


@torch.no_grad()
def streamed_nll(published: Published, rows: list[list[int]], inverted: Container[str] = ()) -> list[float]:
    """Negative log-likelihoods in nats of every token but the first of each row.

    Args:
        published: of a known architecture.
        rows: of at least two tokens each.
        inverted: names of matrices whose levels are taken for their reciprocals.

    Raises:
        CheckpointError: a parameter cannot be read, or has another shape than the model's.
    """
    config = published.config
    assert config is not None, "a forward pass needs an architecture"
    embedding_VD = _values(published, EMBEDDING, inverted)
    if embedding_VD.shape != (config.vocab_size, config.hidden_size):
        raise CheckpointError(f"{EMBEDDING} is {tuple(embedding_VD.shape)}")
    hidden = [embedding_VD[torch.tensor(row[:-1])][None] for row in rows]
    del embedding_VD
    for depth in range(config.num_layers):
        with torch.device("meta"):
            block = Block(config)
        _fill_(block, f"model.layers.{depth}.", published, inverted)
        hidden = [block(x_BTD, *_rotations(config, x_BTD)) for x_BTD in hidden]
    with torch.device("meta"):
        norm = NORMS[config.norm](config.hidden_size, config)
    _fill_(norm, "model.norm.", published, inverted)
    head_VD = _values(published, EMBEDDING if config.tie_embeddings else HEAD, inverted)
    return [
        nats
        for x_BTD, row in zip(hidden, rows, strict=True)
        for nats in token_nll(norm(x_BTD)[0], head_VD, torch.tensor(row[1:]), ROWS_AT_ONCE).tolist()
    ]


def _rotations(config: ModelConfig, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_tables(config, x_BTD.shape[1], x_BTD.device)


def _fill_(module: nn.Module, prefix: str, published: Published, inverted: Container[str]) -> None:
    """Give a module on the meta device its parameters, and layers with codes the rounding of their inputs."""
    for name, parameter in list(module.named_parameters()):
        weights = published.read(f"{prefix}{name}")
        values = _dequantized(weights, inverted=f"{prefix}{name}" in inverted)
        if values.shape != parameter.shape:
            raise CheckpointError(f"{prefix}{name} is {tuple(values.shape)} instead of {tuple(parameter.shape)}")
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, last, nn.Parameter(values, requires_grad=False))
        if isinstance(weights, Coded) and published.inputs != "none":
            owner.register_forward_pre_hook(partial(_round_inputs, activations=published.inputs))


def _values(published: Published, name: str, inverted: Container[str]) -> Tensor:
    return _dequantized(published.read(name), inverted=name in inverted)


def _dequantized(weights: Tensor | Coded, *, inverted: bool) -> Tensor:
    if isinstance(weights, Tensor):
        return weights
    return (weights.inverted() if inverted else weights).values()


def _round_inputs(layer: nn.Module, inputs: tuple[Any, ...], *, activations: Activations) -> Tensor:
    codes, scale = quantize_activation(inputs[0], activations)
    return codes * scale
