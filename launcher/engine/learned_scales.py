"""Learned scales of quantized layers on a sharded model: parameters that only some phases use.

They are part of the model from the first step, so that a switch adds no parameter to an optimizer. Before the switch
they are ones without a gradient. At the switch each starts at its row's largest weight, so that a checkpoint without
them, such as a 16-bit one from elsewhere, loads just as well. Scales that were trained for the same levels stay. In a
phase that does not use them they rest: their gradient is 0, and their moments are cleared.
"""

import math
import re

import torch
import torch.distributed as dist

from launcher.engine.contract import MOMENTS, Engine, Shard
from quant.config import QuantConfig
from quant.linear import LEARNED_SCALE, is_learned_scale, quantized_layers
from quant.rounding import bf16_values, first_alpha


@torch.no_grad()
def initialize_scales_(engine: Engine, before: QuantConfig | None = None) -> None:
    """Set the learned scales of the quantized layers to their rows' largest weights, and their moments to 0.

    The moments of scales that the phase does not use are cleared too.

    Each rank looks at its ranges of the matrices, and the largest of all ranks' is taken, which is exact: the scales do
    not depend on how the model is sharded. A collective.

    Args:
        engine: with the model quantized.
        before: what the weights were trained with so far; scales that it has for the same levels stay as they are.
    """
    if not any(is_learned_scale(name) for name, _ in engine.model.named_parameters()):
        return
    layers = quantized_layers(engine.model)
    shards = list(engine.shards())
    for shard in shards:
        if is_learned_scale(shard.name):
            layer = layers.get(shard.name.removesuffix(f".{LEARNED_SCALE}"))
            if layer is None or not layer.quant_config.learned:
                _forget_moments(shard)
    levels = {
        name: layer.quant_config.levels
        for name, layer in layers.items()
        if layer.quant_config.learned and not _was_trained(name, layer.quant_config, before)
    }
    if not levels:
        engine.refresh_weights()  # no weight has changed, but stage 3 of ZeRO forgets the last gradients with it
        return
    rows = {name: layers[name].out_features for name in levels}
    everything = torch.zeros(sum(rows.values()), device=engine.device)
    largest = dict(zip(rows, everything.split(list(rows.values())), strict=True))
    for shard in shards:
        if (name := shard.name.removesuffix(".weight")) in levels:
            values, width = bf16_values(shard.tensors["weight"]).abs(), math.prod(shard.shape[1:])
            row, offset = divmod(shard.start, width)
            padded = torch.zeros(math.ceil((offset + len(values)) / width) * width, device=values.device)
            padded[offset : offset + len(values)] = values
            found = padded.view(-1, width).amax(1).to(engine.device)
            torch.maximum(largest[name][row : row + len(found)], found, out=largest[name][row : row + len(found)])
    dist.all_reduce(everything, op=dist.ReduceOp.MAX)
    for shard in shards:
        if is_learned_scale(shard.name) and (name := shard.name.removesuffix(f".{LEARNED_SCALE}")) in levels:
            end = shard.start + len(shard.tensors["weight"])
            shard.tensors["weight"].copy_(first_alpha(largest[name], levels[name])[shard.start : end])
            _forget_moments(shard)
            shard.step.zero_()
    engine.refresh_weights()


def _forget_moments(shard: Shard) -> None:
    for moment in MOMENTS:
        shard.tensors[moment].zero_()


def _was_trained(name: str, config: QuantConfig, before: QuantConfig | None) -> bool:
    """Whether a layer's scales were trained for its levels."""
    if before is None or not before.learned or before.levels != config.levels:
        return False
    return re.search(before.include, name) is not None
