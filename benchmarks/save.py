"""What saving costs training, asynchronous against synchronous, and how fast bytes reach the disk.

One process trains a model and saves every few steps. Stall: how much longer the steps with a save take than those
without, as a share of what a synchronous save costs. Speed: bytes of a checkpoint per second, against a plain copy of
as many bytes to the same disk, flushed as well.

    python benchmarks/save.py [--hidden-size 512] [--layers 8] [--rounds 5] [--folder DIR]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measure import report

from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.manifest import Manifest, Precision, Progress
from launcher.checkpoint.saver import Saver
from launcher.config.engine import EngineConfig
from launcher.config.optimizer import OptimizerConfig
from launcher.engine.contract import load_weights
from launcher.engine.fsdp import FSDPEngine
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks, process_group
from model.init import initial_value
from model.size import num_parameters
from model.transformer import ModelConfig, Transformer

STEPS_BETWEEN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the temporary folder's")
    options = parser.parse_args()
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=options.hidden_size,
        num_layers=options.layers,
        num_heads=options.hidden_size // 64,
        intermediate_size=options.hidden_size * 3,
    )
    with process_group(600) as ranks, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        numbers, device = measure(config, ranks, Path(folder), options.rounds), ranks.device
    text = (
        f"{num_parameters(config) / 1e6:.0f} M parameters, {numbers['checkpoint_mb']} MB a checkpoint, "
        f"{options.rounds} interleaved rounds, medians.\n\n"
        "| | synchronous | asynchronous |\n| --- | --- | --- |\n"
        f"| seconds that training waits for a save | {numbers['sync_stall_seconds']} "
        f"| {numbers['async_stall_seconds']} |\n"
        f"| of them, as a share of the synchronous save | 1 | {numbers['stall_ratio']} |\n"
        f"| a step of {numbers['step_seconds']} s while a save is being written, over one while not | "
        f"| {numbers['step_ratio_while_writing']} |\n\n"
        f"A synchronous save moves {numbers['save_mb_per_second']} MB/s, a plain copy with a flush "
        f"{numbers['copy_mb_per_second']}: a ratio of {numbers['save_over_copy']}."
    )
    report(f"save-{device.type}", text, numbers, ("torch",))


def manifest_of(step: int, config: ModelConfig, ranks: Ranks) -> Manifest:
    return Manifest(
        milestone=False,
        has_moments=True,
        step=step,
        tokens=256 * step,
        progress=Progress(step=step, phase=0, skipped_steps=0),
        precision=Precision.in_16_bits(config.num_layers),
        data_fingerprint=None,
        spikes=None,
        teacher=None,
        world_size=ranks.world_size,
        engine="fsdp2",
        zero_stage=None,
        provenance=None,
    )


def measure(config: ModelConfig, ranks: Ranks, folder: Path, rounds: int) -> dict[str, float]:
    with torch.device("meta"):
        model = Transformer(config)
    engine = FSDPEngine(
        model,
        list(model.model.layers),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        config=EngineConfig(),
        compute_dtype=torch.float32 if ranks.device.type == "cpu" else torch.bfloat16,
        device=ranks.device,
    )
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config, 0, rows))
    tokens = torch.randint(0, config.vocab_size, (1, 257), device=ranks.device)

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss, last=True)
        engine.step(StepSizes(1e-4))
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    savers = {
        asynchronous: Saver(folder, ranks, tokenizer=None, keep_last=0, asynchronous=asynchronous, say=print)
        for asynchronous in (True, False)
    }
    stalls: dict[bool, list[float]] = {True: [], False: []}
    alone, while_writing, copies = [], [], []
    for number in range(rounds + 1):
        for asynchronous, saver in savers.items():
            alone += [step() for _ in range(STEPS_BETWEEN)]
            began = time.perf_counter()
            saver.save(engine, manifest=manifest_of(number, config, ranks), config_text="", must=True)
            stall = time.perf_counter() - began
            if asynchronous:
                while_writing.append(step())
                saver.wait()
            if number:  # the first touches the staging memory for the first time
                stalls[asynchronous].append(stall)
            checkpoint = folder_of(folder, number)
            if not asynchronous:
                copies.append(timed_copy(checkpoint / "rank-00000.safetensors", folder / "copy"))
            size = sum(path.stat().st_size for path in checkpoint.iterdir())
            shutil.rmtree(checkpoint)
    sync, copy = statistics.median(stalls[False]), statistics.median(copies)
    return {
        "checkpoint_mb": round(size / 1e6),
        "step_seconds": round(statistics.median(alone), 3),
        "sync_stall_seconds": round(sync, 3),
        "async_stall_seconds": round(statistics.median(stalls[True]), 3),
        "stall_ratio": round(statistics.median(stalls[True]) / sync, 3),
        "step_ratio_while_writing": round(statistics.median(while_writing) / statistics.median(alone), 2),
        "save_mb_per_second": round(size / 1e6 / sync),
        "copy_mb_per_second": round(size / 1e6 / copy),
        "save_over_copy": round(copy / sync, 2),
    }


def timed_copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


if __name__ == "__main__":
    main()
    assert not dist.is_initialized()
