"""A configuration for a size, a number of tokens and some GPUs: what `tritrain init` writes.

Sizes, rates and batches follow published runs; micro-batch, recomputation and sharding are the fastest ones that fit
into the GPUs' memory by the plan's own model (`launcher.plan.memory`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.engine import EngineName
from launcher.config.file import parse_config
from launcher.errors import ConfigError
from launcher.plan.gpus import UTILIZATION, Gpu
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from model.config import MOST, ModelConfig
from model.size import flops_per_token, num_parameters

Tree = dict[str, Any]

WIDTH = 256
"""All widths are multiples of a block of GGUF's ternary types, so that a model has every export."""
LARGEST_ERROR = 0.05
"""Of the number of parameters, as a share."""
MEMORY_SHARE = 0.85
"""Of a GPU's memory that the estimate may take; it leaves out temporary buffers and what the allocator loses."""
CPU_MEMORY_GIB = 4
FEWEST_STEPS = 100
ENOUGH_STEPS = 2000
"""A smaller batch is taken for fewer steps than this."""
SAVE_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The request: size, tokens, GPUs."""

    num_parameters: int
    num_tokens: int
    num_gpus: int
    """0 trains on the CPU, with one rank."""
    gpu: Gpu
    engine: EngineName
    vocab_size: int
    """Rows of the embedding."""
    sequence_length: int
    model: Tree | None = None
    """The model, if it is not to be of the size alone: it goes on in ternary, with a teacher of its own size."""

    @property
    def num_ranks(self) -> int:
        """One for each GPU."""
        return self.num_gpus or 1


def by_size(size: int, *steps: tuple[float, Any]) -> Any:
    """The value of the first step whose limit is above the size."""
    return next(value for limit, value in steps if size < limit)


def vocabulary_for(size: int) -> int:
    """Tokens of a tokenizer that is yet to be trained: small models should not be all embedding."""
    return by_size(size, (30e6, 4096), (100e6, 16_384), (math.inf, 32_768))


def sequence_length_for(size: int) -> int:
    """Tokens of a sequence where no data say it."""
    return by_size(size, (50e6, 512), (math.inf, 2048))


def propose(wish: Wish) -> Tree:
    """The parts of a configuration that follow from a wish: `model`, `training`, `optimizer`, `engine` and so on.

    Raises:
        ConfigError: the tokens are too few for a run, no model has so few parameters, or nothing fits into memory.
    """
    model = wish.model or model_for(wish)
    per_rank = sequences_per_rank(wish)
    sequences = per_rank * wish.num_ranks
    total_steps = math.ceil(wish.num_tokens / (sequences * wish.sequence_length))
    if total_steps < FEWEST_STEPS:
        raise ConfigError(
            f"--tokens: {wish.num_tokens:,} are {total_steps} steps of {sequences * wish.sequence_length:,} tokens on "
            f"{wish.num_ranks} ranks, and a run needs {FEWEST_STEPS} or more: give more tokens or fewer GPUs"
        )
    ramp_steps = min(1000, 0.8 * total_steps / 20) if wish.model is None else total_steps / 4
    common = {
        "model": model,
        "optimizer": {
            "learning_rate": by_size(wish.num_parameters, (50e6, 1e-3), (0.9e9, 6e-4), (5e9, 4e-4), (math.inf, 3e-4))
        },
        "schedule": {"shape": "cosine", "warmup_steps": rounded(min(2000, total_steps / 20)), "final_fraction": 0.1},
        "ramp_steps": rounded(ramp_steps),
        "save_steps": save_interval(wish, model, sequences, total_steps),
        "evaluation_steps": rounded(total_steps / 20),
    }
    budget = MEMORY_SHARE * 2**30 * (wish.gpu.memory_gib if wish.num_gpus else CPU_MEMORY_GIB)
    smallest = math.inf
    for training, engine in candidates(wish, per_rank):
        training |= {"global_batch_sequences": sequences, "total_tokens": wish.num_tokens}
        tree = common | {"training": training, "engine": engine}
        smallest = min(smallest, needed := bytes_per_rank(tree, wish))
        if needed <= budget:
            return tree
    raise ConfigError(
        f"--size: {wish.num_parameters:,} parameters need {smallest / 2**30:.0f} GiB on each of {wish.num_ranks} ranks "
        f"at the least, and {budget / 2**30:.0f} GiB may be used there: take more GPUs or a smaller model"
    )


def model_for(wish: Wish) -> Tree:
    """The shape that is nearest to a number of parameters, as wide for its depth as published models of the size.

    Raises:
        ConfigError: none is within `LARGEST_ERROR`.
    """
    size = wish.num_parameters
    width_for_depth = by_size(size, (50e6, 32), (0.5e9, 64), (0.9e9, 96), (math.inf, 128))

    def misfit(shape: Tree) -> float:
        ratio = shape["hidden_size"] / shape["num_layers"] / width_for_depth
        return abs(math.log(ratio)) + 20 * abs(math.log(num_parameters(ModelConfig(**shape)) / size))

    best = min(shapes(wish), key=misfit, default=None)
    if best is None:
        smallest = WIDTH * wish.vocab_size + 10 * WIDTH**2
        raise ConfigError(
            f"--size: no model of {size:,} parameters has widths that are multiples of {WIDTH} up to 8192, at "
            f"most {MOST['num_layers']} blocks and a vocabulary of {wish.vocab_size:,}; {smallest:,} parameters would "
            "be near the least"
        )
    return best


def shapes(wish: Wish) -> Iterator[Tree]:
    """All shapes that have about the number of parameters asked for."""
    for hidden in (*range(WIDTH, 2048, WIDTH), *range(2048, 8193, 512)):  # the latter have heads in groups of four
        head_dim = 64 if hidden < 2048 else 128
        heads = hidden // head_dim
        for intermediate in {WIDTH * math.floor(8 * hidden / 3 / WIDTH), WIDTH * math.ceil(8 * hidden / 3 / WIDTH)}:
            shape: Tree = {
                "vocab_size": wish.vocab_size,
                "hidden_size": hidden,
                "num_layers": 1,
                "num_heads": heads,
                "num_kv_heads": heads // 4 if hidden >= 2048 else heads,
                "intermediate_size": intermediate,
                "sub_norm": True,
                "max_sequence_length": wish.sequence_length,
                "z_loss": 1e-5,
            }
            one = num_parameters(ModelConfig(**shape))
            block = num_parameters(ModelConfig(**shape | {"num_layers": 2})) - one
            layers = round((wish.num_parameters - one) / block) + 1
            error = one + (layers - 1) * block - wish.num_parameters
            if 1 <= layers <= MOST["num_layers"] and abs(error) <= LARGEST_ERROR * wish.num_parameters:
                yield shape | {"num_layers": layers}


def sequences_per_rank(wish: Wish) -> int:
    """Sequences of a step on each rank: a power of two, near the batch that suits the size, less in a short run."""
    tokens = by_size(wish.num_parameters, (50e6, 2**17), (0.9e9, 2**19), (5e9, 2**20), (math.inf, 2**21))
    while tokens > wish.num_tokens / ENOUGH_STEPS and tokens > wish.num_ranks * wish.sequence_length:
        tokens //= 2
    return 2 ** max(0, round(math.log2(tokens / (wish.num_ranks * wish.sequence_length))))


def candidates(wish: Wish, per_rank: int) -> Iterator[tuple[Tree, Tree]]:
    """Sections `training` and `engine`, the fastest first: what saves memory costs time."""
    dtype = {} if wish.num_gpus else {"compute_dtype": "fp32"}
    micro_batches = [2**power for power in range(5, -1, -1) if 2**power <= per_rank]
    for engine in engines(wish):
        for checkpointing in (False, True):
            for micro in micro_batches:
                if checkpointing or micro >= min(4, per_rank):
                    yield (
                        {"micro_batch_sequences": micro, "activation_checkpointing": checkpointing} | dtype,
                        engine,
                    )


def engines(wish: Wish) -> Iterator[Tree]:
    """Sections `engine`, the fastest first."""
    if wish.engine == "deepspeed":
        yield from ({"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3))
        yield {"name": "deepspeed", "zero_stage": 3, "offload": "all"}
        return
    yield {"name": "fsdp2"}
    if wish.num_ranks > 1:
        yield {"name": "fsdp2", "reduce_gradients": "micro-batch"}
    yield {"name": "fsdp2", "reduce_gradients": "micro-batch", "offload": "all"}


def bytes_per_rank(tree: Tree, wish: Wish) -> float:
    """The plan's estimate."""
    config = parse_config(
        {
            "run": {"name": "proposal"},
            "data": {"sources": [{"path": "data"}], "sequence_length": wish.sequence_length},
            "phases": phases(tree["ramp_steps"]) if wish.model is None else [TAUGHT],
        }
        | {name: tree[name] for name in ("model", "training", "optimizer", "schedule", "engine")}
    )
    return sum(memory_bytes_per_rank(make_plan(config, wish.num_ranks)).values())


TAUGHT: Tree = {"precision": "ternary", "fraction": 1.0, "distillation": {"teacher": "model"}}
"""The phase of a run that goes on with a model; it needs the most memory that any of them does."""


def phases(ramp_steps: int) -> list[Tree]:
    """A fifth of the tokens in 16 bits, the rest ternary."""
    ramp = {"shape": "linear", "steps": ramp_steps}
    transition = {"optimizer": "keep", "ramp": ramp}
    return [
        {"precision": "16-bit", "fraction": 0.2},
        {"precision": "ternary", "fraction": 0.8, "transition": transition},
    ]


def save_interval(wish: Wish, model: Tree, sequences: int, total_steps: int) -> int:
    """Steps that take about half an hour at the utilization that a plan assumes; a tenth of the run on a CPU."""
    steps = total_steps / 10
    if wish.num_gpus:
        flops = flops_per_token(ModelConfig(**model), wish.sequence_length) * sequences * wish.sequence_length
        steps = min(steps, SAVE_SECONDS * UTILIZATION * wish.gpu.peak_flops_per_second * wish.num_gpus / flops)
    return rounded(steps)


def rounded(value: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above a number; 1 at the least."""
    if value < 1:
        return 1
    power = 10 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value)
