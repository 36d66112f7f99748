"""The contract between the training loop and whatever shards and steps the model.

An engine owns the sharded model and its optimizer, and nothing else: no data, no schedule, no log. Gradients are the
mean over ranks of what `Engine.backward` was given; an engine never divides by the number of micro-batches.

State goes in and out through `Engine.shards`: every rank's part of every parameter, as contiguous flat ranges that
alias the live fp32 tensors. FSDP2 shards rows and ZeRO shards flat buffers, and both are such ranges, so that one
checkpoint format serves both without any rank ever holding a whole model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from launcher.strict import STRICT
from model.distillation import Lesson

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.global_batch_sequences",
    "train_micro_batch_size_per_gpu": "training.micro_batch_sequences",
    "gradient_accumulation_steps": "training.global_batch_sequences (accumulation is derived)",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "training.compute_dtype",
    "fp16": "training.compute_dtype",
    "torch_autocast": "training.compute_dtype",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_force_ds_cpu_optimizer": "engine.offload",
    "zero_allow_untested_optimizer": "optimizer",
    "data_types": "training.compute_dtype",
    "communication_data_type": "training.compute_dtype",
    "prescale_gradients": "optimizer",
    "gradient_predivide_factor": "optimizer",
    "tensorboard": "logging",
    "wandb": "logging",
}
"""DeepSpeed keys that Tritrain derives, and the key of ours that decides each."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What shards and steps the model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """PyTorch FSDP2, or DeepSpeed ZeRO."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed: what is sharded. 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    replicas: int = 1
    """FSDP2: number of replicas; above 1, each replica shards over its own ranks (HSDP)."""
    reshard_after_forward: bool = True
    """FSDP2: free the gathered weights after the forward pass, and gather them again for the backward pass."""
    reduce_gradients: Literal["step", "micro-batch"] = "step"
    """FSDP2: once a `step`, for which each rank sums whole gradients in fp32, or for every `micro-batch`, which sends
    more and holds a shard."""
    gather: Literal["weights", "codes"] = "weights"
    """FSDP2: what ranks send of ternary layers at full strength: latent `weights` in the compute dtype, or `codes` of 2
    bits, once a step, which compute the same, bit for bit where nothing is compiled."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in host memory: `optimizer` its state (DeepSpeed), `all` parameters too (FSDP2, ZeRO-3)."""
    deepspeed: dict[str, Any] | None = None
    """Further DeepSpeed configuration keys, passed through; those that Tritrain derives are refused."""
    timeout_seconds: int = 600
    """A collective that takes longer than this ends the job."""

    def __post_init__(self) -> None:
        problems = {}
        if self.replicas < 1:
            problems["replicas"] = f"is {self.replicas}; 1 (full sharding) or more"
        if self.timeout_seconds < 1:
            problems["timeout_seconds"] = f"is {self.timeout_seconds}; must be 1 or more"
        if self.name == "deepspeed":
            if self.zero_stage is None:
                problems["zero_stage"] = "is missing; engine.name deepspeed needs 0, 1, 2 or 3"
            if self.replicas > 1:
                problems["replicas"] = "belongs to fsdp2; with deepspeed it must stay 1"
            if not self.reshard_after_forward:
                problems["reshard_after_forward"] = "belongs to fsdp2; with deepspeed, zero_stage 2 keeps the weights"
            if self.reduce_gradients != "step":
                problems["reduce_gradients"] = "belongs to fsdp2; with deepspeed, zero_stage says when"
            if self.gather == "codes":
                problems["gather"] = "is codes; only fsdp2 gathers codes, so take engine.name fsdp2 or gather weights"
            if self.offload == "all" and self.zero_stage != 3:
                problems["offload"] = "is all; only zero_stage 3 can offload parameters, 1 and 2 can do optimizer"
            if self.offload == "optimizer" and self.zero_stage == 0:
                problems["offload"] = "is optimizer; zero_stage 0 cannot offload, 1, 2 and 3 can"
            for key in _dotted_keys(self.deepspeed or {}):
                for owned, ours in OWNED_DEEPSPEED_KEYS.items():
                    if key == owned or key.startswith(owned + "."):
                        problems[f"deepspeed.{key}"] = f"is derived; set {ours} instead"
        else:
            if self.zero_stage is not None:
                problems["zero_stage"] = f"is {self.zero_stage}; only engine.name deepspeed has stages"
            if self.deepspeed is not None:
                problems["deepspeed"] = "is given; only engine.name deepspeed takes it"
            if self.offload == "optimizer":
                problems["offload"] = "is optimizer; fsdp2 offloads all or none"
            if self.offload == "all" and self.gather == "codes":
                problems["gather"] = "is codes, which are made on the device; with offload all it must be weights"
        if problems:
            raise ValueError(problems)


def _dotted_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@dataclass(frozen=True)
class Shard:
    """A contiguous range of one flattened parameter, with its optimizer state, as live fp32 tensors of this rank."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    tensors: dict[str, Tensor]
    """`weight`, `exp_avg` and `exp_avg_sq`: flat tensors of one length that alias the state; writing changes it."""
    step: Tensor
    """Number of updates behind the moments, a 0-dim tensor; parameters may share it."""
    primary: bool
    """Whether this rank is the one that saves the range; the other holders of a replicated range do not."""


class Engine(ABC):
    """Owns the sharded model and its optimizer. The module's docstring has the contract."""

    model: nn.Module
    device: torch.device

    @abstractmethod
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        reduction: str = "mean",
        teacher: Lesson | None = None,
    ) -> Tensor:
        """Run the model; with labels the loss, without them the logits (see `model.transformer.Transformer`)."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of ``loss``; ``last`` marks the step's last micro-batch, when ranks reduce."""

    @abstractmethod
    def gradient_squares(self) -> dict[str, Tensor]:
        """This rank's part of the squared L2 norm of each parameter's gradient, before clipping.

        To be asked for between the last `backward` of a step and `step`. The parts are 0-dim tensors on the device,
        and add up to the whole over all ranks; a parameter of which this rank has no part may be left out.
        """

    @abstractmethod
    def step(
        self,
        learning_rate: float,
        *,
        ternary_factor: float = 1.0,
        decay_factor: float = 1.0,
        grad_norm_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clip, update and clear the gradients.

        A step whose gradient norm is not finite, or above the limit, is skipped: it clears the gradients and changes
        nothing else, neither weights nor optimizer state.

        Args:
            learning_rate: of this step.
            ternary_factor: multiplies it for the parameters that have a group of their own.
            decay_factor: multiplies the weight decay.
            grad_norm_limit: 0-dim, on the device, equal on all ranks; -1 skips the step in any case.

        Returns:
            The gradient norm before clipping and whether the step was skipped (1.0) or taken (0.0), both as 0-dim
            fp32 tensors on the device, equal on all ranks.
        """

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's part of the state, parameter by parameter in the model's order."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Renew what is derived from the fp32 weights (16-bit copies) after `shards` were written to."""


@torch.no_grad()
def load_weights(engine: Engine, value_of: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Fill the weights of ``engine`` from whole tensors, given one at a time by name and shape."""
    for shard in engine.shards():
        weight = shard.tensors["weight"]
        weight.copy_(value_of(shard.name, shard.shape).flatten()[shard.start : shard.start + weight.numel()])
    engine.refresh_weights()
