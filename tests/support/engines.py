"""Both engines on a tiny model: built, stepped, and their state gathered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.engine import EngineConfig
from launcher.config.optimizer import OptimizerConfig
from launcher.engine.contract import Engine, load_weights
from launcher.engine.fsdp import FSDPEngine
from launcher.engine.zero import ZeroEngine
from launcher.plan.schedule import StepSizes
from model.init import initial_value
from model.transformer import ModelConfig, Transformer
from quant.linear import is_learned_scale

# Rows that neither 2 nor 3 ranks divide, and gradients that are clipped.
MODEL = ModelConfig(
    vocab_size=257, hidden_size=66, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_size=101, sub_norm=True,
    max_sequence_length=32,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5)
LEARNING_RATE, NUM_STEPS, NUM_SEQUENCES, NUM_MICRO_BATCHES = 3e-3, 20, 8, 2
ENGINES = ("fsdp2", "zero-0", "zero-1", "zero-2", "zero-3")
CPU = torch.device("cpu")


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 257, (NUM_SEQUENCES, 1), generator=generator)
    steps = torch.randint(1, 4, (NUM_SEQUENCES, 32), generator=generator)
    tokens = torch.cat([starts, starts + steps.cumsum(1)], 1) % 257
    return tokens[:, :-1], tokens[:, 1:]


def build(name: str, dtype: torch.dtype, **keys: Any) -> Engine:
    with torch.device("meta"):
        model = Transformer(MODEL)
    return shard(model, name, dtype, **keys)


def shard(
    model: Transformer,
    name: str,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    muon: bool | None = None,
    **keys: Any,
) -> Engine:
    if name == "fsdp2":
        blocks = list(model.model.layers)
        engine: Engine = FSDPEngine(
            model,
            blocks,
            optimizer=OPTIMIZER,
            config=EngineConfig(**keys),
            compute_dtype=dtype,
            device=device,
            muon=muon,
        )
    else:
        engine = ZeroEngine(
            model,
            optimizer=OPTIMIZER,
            config=EngineConfig(name="deepspeed", zero_stage=int(name[-1]), **keys),  # type: ignore[arg-type]
            compute_dtype=dtype,
            device=device,
            micro_batch_sequences=NUM_SEQUENCES // dist.get_world_size() // NUM_MICRO_BATCHES,
            num_micro_batches=NUM_MICRO_BATCHES,
            muon=muon,
        )
    list(engine.shards())  # looking at the state before the first step must not move Adam to step 1
    load_weights(engine, first_value)
    return engine


def first_value(name: str, shape: tuple[int, ...], rows: range) -> Tensor:
    return torch.ones(len(rows)) if is_learned_scale(name) else initial_value(name, shape, MODEL, 0, rows)


def step_once(engine: Engine, step: int, poison: float = 1.0) -> tuple[float, float, float]:
    """One step on this rank's part of the batch; returns the mean loss of all ranks, gradient norm and skipped."""
    tokens, labels = (tensor.to(engine.device) for tensor in batch(step))
    rank, size = dist.get_rank(), NUM_SEQUENCES // dist.get_world_size() // NUM_MICRO_BATCHES
    total = torch.zeros(())
    for index in range(NUM_MICRO_BATCHES):
        rows = slice((rank * NUM_MICRO_BATCHES + index) * size, (rank * NUM_MICRO_BATCHES + index + 1) * size)
        loss = engine.forward(tokens[rows], labels[rows]).loss / NUM_MICRO_BATCHES
        engine.backward(loss * poison, last=index == NUM_MICRO_BATCHES - 1)
        total = total + loss.detach().cpu()
    norm, skipped = engine.step(StepSizes(LEARNING_RATE))
    dist.all_reduce(total)
    return total.item() / dist.get_world_size(), norm.item(), skipped.item()


def gathered(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Whole tensors from all ranks' shards, on every rank."""
    shards = [shard for shard in engine.shards() if shard.primary and kind in shard.tensors]
    mine = [(shard.name, shard.shape, shard.start, shard.tensors[kind].clone()) for shard in shards]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    for name, shape, start, values in (piece for pieces in everyone for piece in pieces):
        flat = whole.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype)).view(-1)
        flat[start : start + len(values)] = values
    return whole


def state_of(engine: Engine) -> dict[str, Tensor]:
    state = {}
    for shard in engine.shards():
        state |= {f"{kind}/{shard.name}": tensor.clone() for kind, tensor in shard.tensors.items()}
        state[f"step/{shard.name}"] = shard.step.clone()
    return state
