"""Bytes that a rank sends in an optimizer step: which collectives each engine runs, and what a ring costs for each.

With N ranks and a tensor of S bytes, each rank of a ring sends (N - 1) / N * S for an all-gather or a reduce-scatter,
and twice that for an all-reduce, which is one after the other (Patarasuk and Yuan 2009,
doi 10.1016/j.jpdc.2008.09.002). NCCL may choose trees or in-network reduction instead, which send other amounts.

A ternary phase sends what a 16-bit one does: ranks gather latent weights in the compute dtype and each rank rounds them
by itself. With `engine.gather: codes` a step at full strength gathers packed codes instead, and all of it once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

from launcher.config.sections import Config
from launcher.plan.memory import (
    beside_codes,
    coded_layers,
    gathers_codes,
    last_quantization,
    zero3_held_parameters,
)
from launcher.plan.muon import matrix_shapes
from launcher.plan.plan import Plan
from model.size import is_in_block, num_parameters, parameter_shapes
from quant.size import CODES_PER_BYTE, NUM_MAGNITUDES

Backend = Literal["nccl", "gloo"]


MODELLED_ZERO_KEYS = frozenset(
    {
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        # These say when and in what pieces, not how much.
        "reduce_bucket_size",
        "allgather_bucket_size",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "overlap_comm",
        "contiguous_gradients",
        "round_robin_gradients",
    }
)
"""Keys of `engine.deepspeed.zero_optimization` that the model knows; any other may change what is sent."""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and payload in an optimizer step."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
    what: Literal["weights", "gradients", "updates", "teacher", "scalars"]
    payload_bytes: float
    """Size of the whole tensors: what every rank has after an all-gather, and contributes to the reductions; what all
    ranks together have before an all-to-all, and send on evenly."""
    group_size: int
    """Ranks that take part in each."""
    count: float = 1
    """How often in a step; a fraction where only some of the tensors take part."""

    def bytes_sent(self, backend: Backend = "nccl") -> float:
        """Bytes that a rank of the group sends in a step. Gloo does an all-reduce to reduce-scatter."""
        if self.kind == "all-to-all":
            return self.count * (self.group_size - 1) / self.group_size * self.payload_bytes / self.group_size
        passes = 2 if self.kind == "all-reduce" or (self.kind == "reduce-scatter" and backend == "gloo") else 1
        return self.count * passes * (self.group_size - 1) / self.group_size * self.payload_bytes


def collectives(plan: Plan, *, codes: bool = False) -> list[Collective]:
    """The collectives of an optimizer step.

    Left out is what logged steps, evaluations and checkpoints add.

    Args:
        plan: of the run.
        codes: of a ternary step at full strength, with `engine.gather: codes`. All others are alike.

    Raises:
        ValueError: DeepSpeed is given keys that change what it sends in ways that are not modeled.
    """
    if unknown := unmodeled_keys(plan.config):
        raise ValueError(f"what {', '.join(unknown)} would change is not modeled")
    found = _of_fsdp2(plan, codes=codes) if plan.config.engine.name == "fsdp2" else _of_zero(plan)
    if any(phase.distillation for phase in plan.phases):
        found.append(_of_teacher(plan))
    found += _of_muon(plan)
    found.append(Collective("all-reduce", "scalars", 8, plan.world_size))  # whether to stop, and whether to save
    return found


def bytes_sent(plan: Plan, *, backend: Backend = "nccl", codes: bool = False) -> dict[str, float]:
    """Bytes that a rank sends in an optimizer step, by kind; raises what `collectives` raises."""
    sent: dict[str, float] = {}
    for collective in collectives(plan, codes=codes):
        sent[collective.what] = sent.get(collective.what, 0) + collective.bytes_sent(backend)
    return sent


def describe_traffic(plan: Plan) -> dict[str, Any]:
    """The traffic that `tritrain plan` prints, by name with unit; None if it is not modeled."""
    kinds = {"bytes_sent_per_rank_and_step": False}
    if gathers_codes(plan) and coded_layers(plan):
        kinds["bytes_sent_per_rank_and_step_in_codes"] = True
    known = not unmodeled_keys(plan.config)
    return {
        name: {what: round(size) for what, size in bytes_sent(plan, codes=codes).items()} if known else None
        for name, codes in kinds.items()
    }


def unmodeled_keys(config: Config) -> list[str]:
    """Dotted DeepSpeed keys of a configuration that may change what is sent in ways that are not modeled."""
    given = (config.engine.deepspeed or {}).get("zero_optimization", {})
    return [f"engine.deepspeed.zero_optimization.{key}" for key in given if key not in MODELLED_ZERO_KEYS]


def padded_parameters(shapes: Mapping[str, tuple[int, ...]], shards: int) -> int:
    """Elements that FSDP2 gathers: it pads the first dimension to a multiple of the number of shards."""
    return sum(ceil(shape[0] / shards) * shards * prod(shape[1:]) for shape in shapes.values())


def _of_fsdp2(plan: Plan, *, codes: bool) -> list[Collective]:
    """Gradients are reduced in fp32, once a step or for each micro-batch; weights are gathered for each pass.

    What is outside of blocks is needed from the end of the forward pass on, and gathered for both at once. A step in
    codes gathers these with all else once for all its passes, and for the scales a sum of each row in fp64 or, for
    medians, adds up the counts of magnitudes of each matrix.
    """
    engine = plan.config.engine
    shards = plan.world_size // engine.replicas
    compute_bytes, passes = plan.config.training.compute_bytes, 2 if engine.reshard_after_forward else 1
    shapes = parameter_shapes(plan.config.model)
    elements = padded_parameters(shapes, shards)
    reductions = plan.most_micro_batches if engine.reduce_gradients == "micro-batch" else 1
    found = [
        Collective("reduce-scatter", "gradients", 4 * elements, shards, reductions),
        Collective("all-reduce", "scalars", 4, shards),  # the gradient norm
    ]
    if engine.replicas > 1:
        found.append(Collective("all-reduce", "gradients", 4 * elements / shards, engine.replicas, reductions))

    def gather(of: Mapping[str, tuple[int, ...]], count: float) -> None:
        found.append(Collective("all-gather", "weights", compute_bytes * padded_parameters(of, shards), shards, count))

    if codes:
        coded = coded_layers(plan)
        once, each = beside_codes(plan)
        gather(once, 1)
        gather(each, passes * plan.most_micro_batches)
        packed = {name: (shape[0], ceil(shape[1] / CODES_PER_BYTE)) for name, shape in coded.items()}
        found.append(Collective("all-gather", "weights", padded_parameters(packed, shards), shards))
        quantization = last_quantization(plan)
        if quantization is not None and quantization.weights == "absmedian":
            found.append(Collective("all-reduce", "scalars", 4 * NUM_MAGNITUDES * len(coded), shards))
        else:
            sums = padded_parameters({name: shape[:1] for name, shape in coded.items()}, shards)
            found.append(Collective("all-gather", "scalars", 8 * sums, shards))
        return found
    gather({name: shape for name, shape in shapes.items() if is_in_block(name)}, passes * plan.most_micro_batches)
    gather({name: shape for name, shape in shapes.items() if not is_in_block(name)}, plan.most_micro_batches)
    return found


def _of_zero(plan: Plan) -> list[Collective]:
    """Gradients are reduced in the compute dtype: once a step at stages 0 and 1, for every micro-batch at 2 and 3.

    Stages 1 and 2 reduce by all-reduce, of which a rank keeps its part, and gather the updated weights once. Stage 3
    gathers weights for the forward pass and, but for those that it keeps in between, for the backward pass.
    """
    config, ranks, micro_batches = plan.config, plan.world_size, plan.most_micro_batches
    stage = config.engine.zero_stage or 0
    whole = config.training.compute_bytes * num_parameters(config.model)
    if stage == 3:
        persistent, kept = zero3_held_parameters(config)
        sharded = num_parameters(config.model) - persistent
        gathers = Collective(
            "all-gather",
            "weights",
            config.training.compute_bytes * sharded,
            ranks,
            micro_batches * (2 - kept / max(sharded, 1)),
        )
        return [
            gathers,
            Collective("all-gather", "weights", config.training.compute_bytes * persistent, ranks),
            Collective("reduce-scatter", "gradients", whole, ranks, micro_batches),
            Collective("all-reduce", "scalars", 8, ranks, 2),  # the gradient norm, and whether it overflowed
        ]
    found = [Collective("all-reduce", "gradients", whole, ranks, micro_batches if stage == 2 else 1)]
    if stage:
        found.append(Collective("all-gather", "weights", whole, ranks))
    if stage == 2 or (stage == 1 and (config.training.compute_dtype == "fp32" or config.engine.offload != "none")):
        found.append(Collective("all-reduce", "scalars", 9, ranks))  # norm, overflow and a flag
    return found


def _of_muon(plan: Plan) -> list[Collective]:
    """Matrices go to their owners in bf16, and their updates back; in stage 0 each rank has them all."""
    engine, elements = plan.config.engine, sum(map(prod, matrix_shapes(plan).values()))
    if not elements or engine.zero_stage == 0:
        return []
    ranks = plan.world_size // (engine.replicas if engine.name == "fsdp2" else 1)
    return [Collective("all-to-all", "updates", 2 * elements, ranks, 2)]


def _of_teacher(plan: Plan) -> Collective:
    """FSDP2 gathers a teacher, taken to be as large as the model, for the forward pass only."""
    shards = plan.world_size // plan.config.engine.replicas
    elements = padded_parameters(parameter_shapes(plan.config.model), shards)
    return Collective(
        "all-gather", "teacher", plan.config.training.compute_bytes * elements, shards, plan.most_micro_batches
    )
