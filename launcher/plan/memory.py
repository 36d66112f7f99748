"""Memory of one rank: bytes of weights, gradients, moments and activations."""

import math
from collections.abc import Mapping
from typing import Literal

from launcher.config.sections import Config
from launcher.plan.course import Course
from launcher.plan.muon import spared_elements
from launcher.plan.plan import Plan
from model.size import (
    activation_bytes,
    block_of,
    is_in_block,
    linear_shapes,
    num_parameters,
    parameter_shapes,
)
from quant.config import IN_2_BITS, QuantConfig, gather_problems
from quant.size import CODES_PER_BYTE


def num_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(map(math.prod, shapes.values()))


def checkpoint_bytes(course: Course) -> int:
    """Size of the largest checkpoint: fp32 weights and average, and both moments of what has both in any phase."""
    copies = 3 + any(map(course.averages, course.phases))
    return 4 * (copies * num_parameters(course.config.model) - spared_elements(course))


def zero3_held_parameters(config: Config) -> tuple[int, int]:
    """Parameters that ZeRO-3 always holds whole because they are small, and those it keeps until the backward pass.

    DeepSpeed keeps a layer whose next use is less than `stage3_max_reuse_distance` parameters away: after a layer come
    the later ones, forward and then backward (and recomputed in between, with activation checkpointing). Its prefetcher
    also runs ahead of the forward pass into the backward pass until `stage3_max_live_parameters` are there, and what it
    finds there on the way is not released.
    """
    given = (config.engine.deepspeed or {}).get("zero_optimization", {})
    shapes = parameter_shapes(config.model).values()
    persistent = sum(
        size for size in map(math.prod, shapes) if size <= given.get("stage3_param_persistence_threshold", 1e5)
    )
    visits = 3 if config.training.activation_checkpointing else 2
    kept = max(given.get("stage3_max_live_parameters", 1e9), given.get("stage3_max_reuse_distance", 1e9) / visits)
    return persistent, min(num_parameters(config.model) - persistent, int(kept))


def last_quantization(course: Course) -> QuantConfig | None:
    """Quantization of the last ternary phase; None without one."""
    return next((phase.quantization for phase in reversed(course.phases) if phase.quantization), None)


def num_ternary_parameters(course: Course) -> int:
    """Weights of the layers that any ternary phase quantizes, by its `include`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for phase in course.phases:
        if phase.quantization is not None:
            shapes |= linear_shapes(course.config.model, phase.quantization.include)
    return num_elements(shapes)


def gathers_codes(course: Course) -> bool:
    """Return whether FSDP2 gathers the layers of the last ternary phase as codes, see `engine.gather`."""
    engine, quantization = course.config.engine, last_quantization(course)
    if engine.name != "fsdp2" or engine.gather == "weights" or engine.offload != "none" or quantization is None:
        return False
    return not gather_problems(quantization)


def coded_layers(course: Course) -> dict[str, tuple[int, ...]]:
    """Shapes, by name, of the weights in blocks that the last ternary phase quantizes: those of `engine.gather`."""
    quantization = last_quantization(course)
    if quantization is None:
        return {}
    layers = linear_shapes(course.config.model, quantization.include)
    return {name: shape for name, shape in layers.items() if is_in_block(name)}


def held_code_bytes(course: Course) -> float:
    """Bytes of the codes of all quantized layers, as they are held."""
    quantization = last_quantization(course)
    if quantization is None:
        return 0
    coded = num_elements(linear_shapes(course.config.model, quantization.include))
    return coded / CODES_PER_BYTE if quantization.levels in IN_2_BITS else coded


def beside_codes(course: Course) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of what is gathered in 16 bits besides `coded_layers`: once a step with them, and once for each pass.

    The latter are blocks without a coded layer.
    """
    coded = coded_layers(course)
    blocks = {block_of(name) for name in coded}
    rest = {name: shape for name, shape in parameter_shapes(course.config.model).items() if name not in coded}
    once = {name: shape for name, shape in rest.items() if not is_in_block(name) or block_of(name) in blocks}
    return once, {name: shape for name, shape in rest.items() if name not in once}


def modes(plan: Plan) -> set[Literal["no", "ramp", "codes"]]:
    """How layers compute in the course of a run; what they keep for the backward pass depends on it."""
    found: set[Literal["no", "ramp", "codes"]] = set()
    for phase in plan.phases:
        if phase.quantization is None:
            found.add("no")
        else:
            found |= {"ramp", "codes"} if any(ramp.steps for ramp in phase.transition.ramps) else {"codes"}
    return found


def num_shards(plan: Plan) -> int:
    """Ranks that one copy of the optimizer's state is sharded over."""
    engine = plan.config.engine
    return plan.world_size // (engine.replicas if engine.name == "fsdp2" else 1)


def offloaded_bytes_per_rank(plan: Plan) -> float:
    """Estimate the bytes of host memory that a rank needs for what `engine.offload` moves there.

    Weights in fp32, moments and average; gradients, of which ZeRO-3 has two copies; and ZeRO-3's 16-bit weights with
    `all`.
    """
    engine, parameters = plan.config.engine, num_parameters(plan.config.model)
    if engine.offload == "none":
        return 0
    total = checkpoint_bytes(plan) + 4 * parameters
    if engine.zero_stage == 3:
        total += (4 + (plan.config.training.compute_bytes if engine.offload == "all" else 0)) * parameters
    return total / num_shards(plan)


def memory_bytes_per_rank(plan: Plan) -> dict[str, float]:
    """Estimate the bytes that one rank holds on its device, without allocator overhead and temporary buffers.

    FSDP2 keeps fp32 weights, gradients and moments, each sharded, and has what is outside of blocks gathered during a
    pass, with two blocks, or with 2-bit codes of all blocks; a rank alone in fp32 gathers nothing but codes. With
    several micro-batches a step it sums whole gradients in fp32 before it reduces them, but for
    `engine.reduce_gradients: micro-batch`.

    ZeRO keeps 16-bit weights (sharded at stage 3, which also holds some whole, see `zero3_held_parameters`), 16-bit
    gradients as they come (summed into sharded fp32 ones from stage 2 on), and sharded fp32 masters and moments (arXiv
    1910.02054, section 5). Offloaded masters and moments are in host memory, and so are ZeRO-3's gradients; stages 1
    and 2 sum theirs on the device first. ZeRO holds the codes of quantized layers whole. A teacher, taken to be as
    large as the model, is sharded by FSDP2 in the compute dtype. The reference of preferences is gone before there are
    gradients, which are larger. Averaged weights lie beside the fp32 weights.
    """
    config, engine = plan.config, plan.config.engine
    parameters = num_parameters(config.model)
    moments = 4 * (2 * parameters - spared_elements(plan))
    average = 4 * parameters * any(map(plan.averages, plan.phases))
    compute_bytes = config.training.compute_bytes
    shards = num_shards(plan)
    in_blocks = num_elements(
        {name: shape for name, shape in parameter_shapes(config.model).items() if is_in_block(name)}
    )
    gathered = compute_bytes * (parameters - in_blocks + in_blocks * min(2 / config.model.num_layers, 1))
    codes = 0.0
    if gathers_codes(plan) and (coded := num_elements(coded_layers(plan))):
        once, each = map(num_elements, beside_codes(plan))
        in_16_bits = compute_bytes * (once + min(each, 2 * in_blocks / config.model.num_layers))
        codes = coded / CODES_PER_BYTE * (1 + 1 / shards)
        gathered = max(gathered, in_16_bits + codes)
    sums_whole = plan.most_micro_batches > 1 and engine.reduce_gradients == "step"
    if engine.name == "fsdp2":
        copies = gathered if shards > 1 or compute_bytes == 2 else codes
        sizes = {
            "weights": 4 * parameters / shards + copies,
            "gradients": 4 * parameters * (1 / shards + (sums_whole and shards > 1)),
            "moments": moments / shards,
            "average": average / shards,
        }
    else:
        stage = engine.zero_stage or 0
        state_shards = shards if stage >= 1 else 1
        masters = 4 * parameters / state_shards if engine.offload == "none" and (compute_bytes == 2 or stage) else 0
        held = sum(zero3_held_parameters(config)) if stage == 3 else 0
        codes = held_code_bytes(plan)
        sizes = {
            "weights": compute_bytes * (parameters / (shards if stage == 3 else 1) + held) + masters + codes,
            "gradients": (4 if stage else compute_bytes) * parameters / (shards if stage >= 2 else 1),
            "moments": moments / state_shards,
            "average": average / state_shards,
        }
    if engine.offload != "none":
        sizes["moments"] = sizes["average"] = 0
        if engine.zero_stage == 3:
            sizes["gradients"] = gathered
    if not average:
        del sizes["average"]
    if engine.offload == "all":
        sizes["weights"] = sizes["gradients"] = gathered
        if engine.name == "fsdp2":  # only reduced gradients go to the host
            sizes["gradients"] += 4 * parameters * sums_whole
    if any(phase.distillation for phase in plan.phases):
        sizes["teacher"] = gathered + (compute_bytes * parameters / shards if engine.offload != "all" else 0)
    sizes["activations"] = max(
        activation_bytes(
            config.model,
            config.training.micro_batch_sequences,
            config.data.sequence_length,
            compute_bytes,
            checkpointing=config.training.activation_checkpointing,
            quantized=quantized,
        )
        for quantized in modes(plan)
    )
    holds_chats = any(phase.objective != "next-token" for phase in plan.phases)
    if holds_chats or config.data.documents == "masked":  # what each token sees, and the rotary tables of every row
        length = config.data.sequence_length
        tables = 2 * config.model.head_width * (4 if config.model.rounds_once else compute_bytes)
        sizes["activations"] += config.training.micro_batch_sequences * length * (length * compute_bytes + tables)
    return sizes
