"""Models for inference, sharded over the ranks as in training, without optimizer or gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from launcher.engine.fsdp import build_mesh, first_element
from launcher.process.ranks import Ranks
from model.transformer import Transformer


@torch.no_grad()
def shard_frozen_(
    model: Transformer,
    read: Callable[[str, int, int], Tensor],
    ranks: Ranks,
    *,
    replicas: int = 1,
    offload: bool = False,
) -> None:
    """Shard a model over all ranks and read this rank's share of its weights; a collective.

    Args:
        model: on the meta device, in its compute dtype, with everything applied that changes its blocks.
        read: returns elements of a weight, given its name, the first element and the number of elements.
        ranks: this rank among all.
        replicas: as of `launcher.config.engine.EngineConfig`.
        offload: keep the weights in host memory.
    """
    model.requires_grad_(False)
    mesh = build_mesh(ranks.device, replicas)
    options: dict[str, Any] = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=True, **options)
    # The head is in the outermost group; a teacher's is still read after its forward pass.
    fully_shard(model, reshard_after_forward=False, **options)
    model.to_empty(device=torch.device("cpu") if offload else ranks.device)
    parameters: Iterator[tuple[str, Any]] = model.named_parameters()  # DTensors
    for name, parameter in parameters:
        local = parameter.to_local()
        values = read(name, first_element(parameter, mesh), local.numel())
        local.copy_(values.view_as(local))
