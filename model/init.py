"""Starting values of the parameters, each from its own random stream.

A parameter's stream is seeded by the run's seed and the parameter's name. So no value depends on which other parameters
exist or on the order in which they are drawn: any process may draw any parameter alone, and every number of processes
starts from the same bits.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.size import PROJECTIONS, parameter_shapes
from model.transformer import ModelConfig, Transformer


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Return the whole starting value of one parameter, float32, on the CPU.

    Norms start at 1, those of SubLN at `sub_norm_init`, biases at 0; all else is drawn around 0. With initialization
    "normal" the standard deviation is `init_std`, for the two projections that write to the residual stream (o_proj,
    down_proj) divided by sqrt(2 * num_layers) (GPT-2). With "mitchell" (OLMo, arXiv 2402.00838) it is 1 /
    sqrt(hidden_size), for these two projections 1 / sqrt(2 * fan_in * (layer + 1)), layers counted from 0, and the
    normal is cut off at three standard deviations.
    A name or shape that the model of this configuration does not have raises ValueError.
    """
    expected = parameter_shapes(config).get(name)
    if expected != tuple(shape):
        has = "no such parameter" if expected is None else f"it in shape {expected}"
        raise ValueError(f"no initial value for {name} of shape {tuple(shape)}: the configured model has {has}")
    if name.endswith(".bias"):
        return torch.zeros(expected)
    module = name.split(".")[-2]
    if module in ("attn_sub_norm", "ffn_sub_norm"):
        return torch.full(expected, config.sub_norm_init)
    if module not in (*PROJECTIONS, "embed_tokens", "lm_head"):
        return torch.ones(expected)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    writes_to_residual = module in ("o_proj", "down_proj")
    value = torch.empty(expected)
    if config.initialization == "normal":
        std = config.init_std / (2 * config.num_layers) ** 0.5 if writes_to_residual else config.init_std
        return nn.init.normal_(value, std=std, generator=generator)
    variance = 1 / config.hidden_size
    if writes_to_residual:
        layer = int(name.split(".")[2])
        variance = 1 / (2 * expected[1] * (layer + 1))
    std = variance**0.5
    return nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)


@torch.no_grad()
def initialize_(model: Transformer, seed: int) -> None:
    """Fill every parameter of a whole, materialized model in place, in its own dtype and on its own device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
