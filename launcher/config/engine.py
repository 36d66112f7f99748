"""The section `engine`: what shards and steps the model."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from launcher.config.strict import STRICT

EngineName = Literal["fsdp2", "deepspeed"]

MOST_SECONDS = 1e9
"""The longest time limit, 31 years; the system's timers can hold it."""

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
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.offload",
    "zero_force_ds_cpu_optimizer": "engine.offload",
    "zero_allow_untested_optimizer": "optimizer",
    "data_types": "training.compute_dtype",
    "communication_data_type": "training.compute_dtype",
    "prescale_gradients": "optimizer",
    "gradient_predivide_factor": "optimizer",
    "tensorboard": "logging",
    "wandb": "logging",
}
"""DeepSpeed keys that Tritrain derives, and the Tritrain key that decides each."""

REFUSED_DEEPSPEED_KEYS: dict[str, tuple[Any, str]] = {
    "zero_optimization.round_robin_gradients": (False, "DeepSpeed's tables do not say where it then keeps the weights"),
    "zero_optimization.zero_hpz_partition_size": (1, "a second partition of the weights is not supported"),
    "zero_optimization.zenflow": (None, "its delayed updates are not in a checkpoint"),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is needed"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has removed it"),
    "zero_optimization.mics_shard_size": (-1, "weights that are sharded over some of the ranks are not supported"),
    "gradient_allreduce_op": ("mean", "the gradient of a step is the mean over its tokens"),
    "sequence_parallel_size": (1, "each rank trains on whole sequences of its own"),
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "data_efficiency",
            "elasticity",
            "expert_parallel",
            "hybrid_engine",
            "pipeline",
            "progressive_layer_drop",
            "tensor_parallel",
        ),
        (None, "it changes the model, its batches or its state in ways that a run does not follow"),
    ),
}
"""DeepSpeed keys that may have one value only, and why."""


class NoTruthValue:
    """Has pydantic refuse true, which equals 1."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticKnownError, core_schema  # not there where only the engine is

        def check(value: Any) -> Any:
            if isinstance(value, bool):
                raise PydanticKnownError("literal_error", {"expected": "0, 1, 2 or 3"})
            return value

        return core_schema.no_info_before_validator_function(check, handler(source))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine, which shards and steps the model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: EngineName = "fsdp2"
    """PyTorch FSDP2, or DeepSpeed ZeRO."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], NoTruthValue()] | None = None
    """DeepSpeed shards: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    replicas: int = 1
    """FSDP2: number of replicas; above 1, each replica shards over its own ranks (HSDP)."""
    reshard_after_forward: bool = True
    """FSDP2: free the gathered weights after the forward pass, and gather them again for the backward pass."""
    reduce_gradients: Literal["step", "micro-batch"] = "step"
    """FSDP2: reduce gradients once a `step`, for which each rank sums whole gradients in fp32, or after every
    `micro-batch`, which sends more and holds only a shard."""
    gather: Literal["auto", "weights", "codes"] = "auto"
    """FSDP2: what ranks gather of ternary layers at full strength: latent `weights` in the compute dtype, for every
    pass, or `codes` of 2 bits, once a step, which compute the same, bit for bit where nothing is compiled; `auto`:
    codes, where the recipe can do without latent weights and nothing is offloaded."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in host memory: the `optimizer` state (DeepSpeed), or `all`, parameters too (FSDP2, ZeRO-3)."""
    deepspeed: dict[str, Any] | None = None
    """Additional DeepSpeed configuration keys, passed through; keys that Tritrain derives are refused."""
    timeout_seconds: int = 600
    """A collective over all ranks that takes longer than this ends the job."""

    def __post_init__(self) -> None:
        problems = {}
        if self.replicas < 1:
            problems["replicas"] = f"is {self.replicas}; 1 (full sharding) or more"
        if not 1 <= self.timeout_seconds <= MOST_SECONDS:
            problems["timeout_seconds"] = f"is {self.timeout_seconds}; must be 1 or more, and at most 1e9, 31 years"
        if self.name == "deepspeed":
            if self.zero_stage is None:
                problems["zero_stage"] = "is missing; engine.name deepspeed needs 0, 1, 2 or 3"
            if self.replicas > 1:
                problems["replicas"] = "belongs to fsdp2; with deepspeed it must stay 1"
            if not self.reshard_after_forward:
                problems["reshard_after_forward"] = "belongs to fsdp2; with deepspeed, zero_stage 2 keeps the weights"
            if self.reduce_gradients != "step":
                problems["reduce_gradients"] = "belongs to fsdp2; with deepspeed, zero_stage decides"
            if self.gather == "codes":
                problems["gather"] = "is codes, which only fsdp2 can gather; choose engine.name fsdp2 or gather weights"
            if self.offload == "all" and self.zero_stage != 3:
                problems["offload"] = "is all, which needs zero_stage 3; with 1 and 2 choose optimizer"
            if self.offload == "optimizer" and self.zero_stage == 0:
                problems["offload"] = "is optimizer, which needs zero_stage 1, 2 or 3"
        else:
            if self.zero_stage is not None:
                problems["zero_stage"] = f"is {self.zero_stage}; only engine.name deepspeed has stages"
            if self.deepspeed is not None:
                problems["deepspeed"] = "is given; only engine.name deepspeed takes it"
            if self.offload == "optimizer":
                problems["offload"] = "is optimizer; with fsdp2 choose all or none"
            if self.offload == "all" and self.gather == "codes":
                problems["gather"] = "is codes, which are computed on the device; with offload all choose weights"
        if problems:
            raise ValueError(problems)
