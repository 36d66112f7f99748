"""The engine on PyTorch FSDP2 (`fully_shard`), also for a single process.

Parameters and optimizer state are fp32; the forward and backward passes run in the compute dtype on gathered copies
(`MixedPrecisionPolicy`), gradients are reduced in fp32. The optimizer works on the local shards as plain tensors:
AdamW is element-wise, plain tensors skip DTensor's dispatch, and the fused kernel can then skip a non-finite step on
the device, without asking the host.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from launcher.config.engine import EngineConfig
from launcher.config.optimizer import OptimizerConfig
from launcher.engine.adamw import create_state, parameter_groups, set_step_sizes
from launcher.engine.contract import MOMENTS, Engine, Shard
from launcher.engine.matrices import Piece
from launcher.engine.muon import MuonAdamW, build_optimizer
from launcher.plan.schedule import StepSizes
from model.distillation import Lesson
from model.preference import Reference
from model.size import is_matrix
from model.transformer import Output
from quant.gather import CodeGather


def build_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """Build a mesh of (replicas, ranks of each) or, with one replica, of all ranks.

    Raises:
        ValueError: ``replicas`` does not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"engine.replicas {replicas} does not divide the {world_size} ranks")
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def first_element(sharded: Tensor, mesh: DeviceMesh) -> int:
    """Index, in the flattened parameter, at which this rank's FSDP2 shard over ``mesh`` begins."""
    shard_rank, num_shards = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    # FSDP2 cuts the first dimension into chunks of equal size; the last ones may be shorter, or empty.
    first_row = min(len(sharded), shard_rank * math.ceil(len(sharded) / num_shards))
    return first_row * math.prod(sharded.shape[1:])


class FSDPEngine(Engine):
    """Shards ``model`` block by block over the ranks of the default process group.

    Args:
        model: on the meta device, with no value yet; what applies to its blocks (quantization, activation
            checkpointing, compilation) is applied already. Write the weights through `shards`.
        blocks: the modules that are gathered one at a time, in the order of the forward pass.
        optimizer: configuration of the optimizer.
        config: configuration of the engine.
        compute_dtype: dtype of the forward and backward passes; parameters are fp32 (fp64 if it is fp64).
        device: where to compute.
        ternary: names of the parameters that have a learning rate of their own.
        compiled: whether to compile what rounds the weights.
        muon: whether Muon updates matrices now; None if it does in no phase of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        *,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        compute_dtype: torch.dtype,
        device: torch.device,
        ternary: Collection[str] = (),
        compiled: bool = False,
        muon: bool | None = None,
    ) -> None:
        storage_dtype = torch.promote_types(compute_dtype, torch.float32)
        mixed = compute_dtype != storage_dtype
        self.mesh = build_mesh(device, config.replicas)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype if mixed else None,
                reduce_dtype=storage_dtype if mixed else None,
                # The rotary tables that blocks are given stay in the precision that the model chose for them.
                cast_forward_inputs=False,
            ),
        }
        if config.offload == "all":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        model = model.to(storage_dtype)
        for block in blocks:
            fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
        # What is outside of blocks ends the forward pass and begins the backward pass: it stays between the two.
        fully_shard(model, reshard_after_forward=False, **options)
        self.model = model.to_empty(device=torch.device("cpu") if config.offload == "all" else device)
        self.device = device
        group = self.mesh.get_group(self.mesh.ndim - 1)
        self.group = group if group.size() > 1 else None
        self.max_grad_norm = optimizer.max_grad_norm
        self._blocks: list[Any] = blocks  # fully_shard changed their class to one with its methods
        self._reduces_each = config.reduce_gradients == "micro-batch"
        self._names = [name for name, _ in self.model.named_parameters()]
        self._sharded: list[Any] = list(self.model.parameters())  # DTensors
        self._local = [nn.Parameter(parameter.to_local()) for parameter in self._sharded]
        self._code_gather: CodeGather | None = None
        if config.gather != "weights" and config.offload == "none":
            self._code_gather = CodeGather(
                self.model,
                blocks,
                group,
                reshard_after_forward=config.reshard_after_forward,
                compiled=compiled,
            )
        dimensions = [parameter.ndim for parameter in self._sharded]
        named = zip(self._names, dimensions, self._local, strict=True)
        groups = parameter_groups(named, optimizer, ternary, with_muon=muon is not None)
        self.optimizer = build_optimizer(groups, optimizer, fused=True, muon=muon, device=device)
        if isinstance(self.optimizer, MuonAdamW):
            self.muon = self.optimizer
            self.muon.find_matrices(self._matrices(), self.group)
            self.muon.turn(on=bool(muon))

    def _matrices(self) -> dict[Tensor, list[Piece]]:
        """The matrices that Muon can update, as the optimizer has them."""
        return {
            local: [Piece(name, tuple(sharded.shape), first_element(sharded, self.mesh), local.numel(), 0)]
            for name, sharded, local in zip(self._names, self._sharded, self._local, strict=True)
            if is_matrix(name, sharded.ndim)
        }

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: str = "mean",
        teacher: Lesson | Reference | None = None,
    ) -> Output:
        if self._code_gather is not None:
            self._code_gather.prepare()
        return self.model(tokens_BT, labels_BT, reduction=reduction, teacher=teacher)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        root: Any = self.model  # fully_shard changed its class to one with these methods
        root.set_requires_gradient_sync(last or self._reduces_each)
        root.set_is_last_backward(last)
        if self._code_gather is not None:
            self._code_gather.keep(not last)
        loss.backward()

    def gradient_squares(self) -> dict[str, Tensor]:
        # Learned scales have no gradient while the strength is 0.
        named = zip(self._names, self._sharded, strict=True)
        gradients = {name: sharded.grad.to_local() for name, sharded in named if sharded.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        replicas = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        squares = (norm.square().to(self.device) / replicas for norm in norms)
        return dict(zip(gradients, squares, strict=True))

    @torch.no_grad()
    def step(
        self,
        sizes: StepSizes,
        *,
        grad_norm_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        pairs = list(zip(self._local, self._sharded, strict=True))
        found = [None if sharded.grad is None else sharded.grad.to_local() for _, sharded in pairs]
        # Learned scales have no gradient where the strength is 0: it is one of zeros then, as in the flat groups of
        # ZeRO, or their moments and steps would not be those of the other engines. The norm has no terms for them,
        # which would change its last bit.
        gradients = [
            torch.zeros_like(local) if gradient is None else gradient
            for local, gradient in zip(self._local, found, strict=True)
        ]
        norms = torch._foreach_norm([gradient for gradient in found if gradient is not None])
        squares = torch.stack([norm.square() for norm in norms]).sum().to(self.device)
        dist.all_reduce(squares, group=self.mesh.get_group(self.mesh.ndim - 1))
        grad_norm = squares.sqrt()
        skipped = (~grad_norm.isfinite()).float()
        if grad_norm_limit is not None:
            skipped = skipped.maximum((grad_norm > grad_norm_limit).float())
        where_state_is = gradients[0].device
        torch._foreach_mul_(gradients, (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0).to(where_state_is))
        self._follow_shards()
        for (local, _), gradient in zip(pairs, gradients, strict=True):
            local.grad = gradient
        set_step_sizes(self.optimizer, sizes)
        # What GradScaler sets: where it is 1, the fused kernel leaves weights, moments and step as they are.
        self.optimizer.found_inf = skipped.to(where_state_is)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.refresh_weights()
        for local, sharded in pairs:
            local.grad = sharded.grad = None
        return grad_norm.float(), skipped

    def own_shards(self) -> Iterator[Shard]:
        self._follow_shards()
        primary = self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0
        for name, sharded, local in zip(self._names, self._sharded, self._local, strict=True):
            shape = tuple(sharded.shape)
            state = create_state(self.optimizer, local, variance=self.has_variance(name, shape))
            yield Shard(
                name=name,
                shape=shape,
                start=first_element(sharded, self.mesh),
                tensors={"weight": local.detach().view(-1)}
                | {kind: state[kind].view(-1) for kind in MOMENTS if kind in state},
                step=state["step"],
                primary=primary,
            )

    def weights(self) -> dict[str, Tensor]:
        self._follow_shards()
        return {name: local.detach().view(-1) for name, local in zip(self._names, self._local, strict=True)}

    def refresh_weights(self) -> None:
        """Free gathered weights and codes: some stay gathered between passes, and codes are made once a step."""
        for module in (self.model, *self._blocks):
            module.reshard()
        if self._code_gather is not None:
            self._code_gather.fresh = False

    def _follow_shards(self) -> None:
        """Point the local tensors at the shards again: FSDP2 moves uneven shards when the first forward pads them."""
        for local, sharded in zip(self._local, self._sharded, strict=True):
            local.data = sharded.to_local().data
