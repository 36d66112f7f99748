"""Starting values of the parameters, each from its own random stream.

A parameter's stream is seeded by the run's seed and the parameter's name; a large parameter has a stream for each block
of its rows. So no value depends on which other parameters exist or on the order in which they are drawn: any process
may draw any part of any parameter alone, and every number of processes starts from the same bits.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.size import PROJECTIONS, parameter_shapes
from model.transformer import ModelConfig, Transformer

BLOCK_ELEMENTS = 2**24
"""The most that is drawn from one stream, in whole rows."""


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int, rows: range | None = None) -> Tensor:
    """Return the starting value of one parameter, or of these of its rows, float32, on the CPU.

    Norms start at 1, those of SubLN at `sub_norm_init`, biases at 0; all else is drawn around 0. With initialization
    "normal" the standard deviation is `init_std`, for the two projections that write to the residual stream (o_proj,
    down_proj) divided by sqrt(2 * num_layers) (GPT-2). With "mitchell" (OLMo, arXiv 2402.00838) it is 1 /
    sqrt(hidden_size), for these two projections 1 / sqrt(2 * fan_in * (layer + 1)), layers counted from 0, and the
    normal is cut off at three standard deviations. Of the embedding it is `embedding_init_std`, unless that is None.
    A name or shape that the model of this configuration does not have raises ValueError.
    """
    expected = parameter_shapes(config).get(name)
    if expected != tuple(shape):
        has = "no such parameter" if expected is None else f"it in shape {expected}"
        raise ValueError(f"no initial value for {name} of shape {tuple(shape)}: the configured model has {has}")
    rows = range(expected[0]) if rows is None else rows
    wanted = (len(rows), *expected[1:])
    if name.endswith(".bias"):
        return torch.zeros(wanted)
    module = name.split(".")[-2]
    if module in ("attn_sub_norm", "ffn_sub_norm"):
        return torch.full(wanted, config.sub_norm_init)
    if module not in (*PROJECTIONS, "embed_tokens", "lm_head"):
        return torch.ones(wanted)
    block_rows = max(1, BLOCK_ELEMENTS // expected[1])
    parts = []
    for block in range(rows.start // block_rows, -(-rows.stop // block_rows)):
        first = block * block_rows
        stream = f"{seed}:{name}" + (f":{block}" if block else "")
        value = torch.empty(min(block_rows, expected[0] - first), expected[1])
        _draw_(value, name, config, hashlib.sha256(stream.encode()).digest())
        parts.append(value[max(rows.start - first, 0) : rows.stop - first])
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(wanted)


def _draw_(value: Tensor, name: str, config: ModelConfig, digest: bytes) -> None:
    """Fill a block of a matrix with its values."""
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    std = _standard_deviation(name, value.shape[1], config)
    if config.initialization == "normal":
        nn.init.normal_(value, std=std, generator=generator)
    else:
        nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)


def _standard_deviation(name: str, fan_in: int, config: ModelConfig) -> float:
    module = name.split(".")[-2]
    writes_to_residual = module in ("o_proj", "down_proj")
    if module == "embed_tokens" and config.embedding_init_std is not None:
        return config.embedding_init_std
    if config.initialization == "normal":
        return config.init_std / (2 * config.num_layers) ** 0.5 if writes_to_residual else config.init_std
    if writes_to_residual:
        layer = int(name.split(".")[2])
        return (1 / (2 * fan_in * (layer + 1))) ** 0.5
    return (1 / config.hidden_size) ** 0.5


@torch.no_grad()
def initialize_(model: Transformer, seed: int) -> None:
    """Fill every parameter of a whole, materialized model in place, in its own dtype and on its own device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
