"""Every engine on several numbers of ranks, and a step of it."""

import torch
import torch.distributed as dist
from engines import LEARNING_RATE, OPTIMIZER

from launcher.checkpoint.manifest import Manifest, Precision, Progress
from launcher.config.engine import EngineConfig
from launcher.engine.contract import Engine
from launcher.engine.fsdp import FSDPEngine
from launcher.engine.zero import ZeroEngine
from launcher.plan.schedule import StepSizes
from model.transformer import ModelConfig, Transformer
from quant.config import QuantConfig
from quant.linear import quantize_

# No dimension of a matrix can be divided by 3 or 4, most not by 2.
MODEL = ModelConfig(
    vocab_size=101, hidden_size=22, num_layers=1, num_heads=1, intermediate_size=35, max_sequence_length=16
)


NUM_SEQUENCES = 12


CPU = torch.device("cpu")


VARIANTS = (
    "fsdp2 x1", "fsdp2 x2", "fsdp2 x4", "hsdp x4", "zero-0 x2",
    "zero-1 x2", "zero-1 x3", "zero-2 x2", "zero-2 x3", "zero-3 x2", "zero-3 x3",
)  # fmt: skip


def world_size_of(variant: str) -> int:
    return int(variant[-1])


def build(variant: str, *, quantized: bool) -> Engine:
    name = variant.split(maxsplit=1)[0]
    with torch.device("meta"):
        model = Transformer(MODEL)
    if quantized:
        quantize_(model, QuantConfig(), CPU)
    if name.startswith("zero"):
        return ZeroEngine(
            model,
            optimizer=OPTIMIZER,
            config=EngineConfig(name="deepspeed", zero_stage=int(name[-1])),  # type: ignore[arg-type]
            compute_dtype=torch.float32,
            device=CPU,
            micro_batch_sequences=NUM_SEQUENCES // dist.get_world_size(),
            num_micro_batches=1,
        )
    config = EngineConfig(replicas=2 if name == "hsdp" else 1)
    blocks = list(model.model.layers)
    return FSDPEngine(model, blocks, optimizer=OPTIMIZER, config=config, compute_dtype=torch.float32, device=CPU)


def step_once(engine: Engine, step: int) -> float:
    """One step on this rank's part of the batch; the mean loss of all ranks."""
    starts = torch.randint(0, 101, (NUM_SEQUENCES, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + torch.arange(17) * (1 + starts % 3)) % 101
    size = NUM_SEQUENCES // dist.get_world_size()
    mine = tokens[dist.get_rank() * size :][:size]
    loss = engine.forward(mine[:, :-1], mine[:, 1:]).loss
    engine.backward(loss, last=True)
    engine.step(StepSizes(LEARNING_RATE))
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def manifest(step: int, *, milestone: bool = False) -> Manifest:
    """What a checkpoint of a 16-bit phase says of itself."""
    return Manifest(
        milestone=milestone,
        has_moments=True,
        step=step,
        tokens=step,
        progress=Progress(step=step, phase=0, skipped_steps=0),
        precision=Precision(quantization=None, weight_strengths=(0.0,), activation_strengths=(0.0,)),
        data_fingerprint=None,
        spikes=None,
        teacher=None,
        world_size=1,
        engine="fsdp2",
        zero_stage=2,
        provenance=None,
    )
