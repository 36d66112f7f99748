"""What gathering codes in place of weights saves: bytes and time of steps of FSDP2, on links of several speeds.

Ranks are processes of this machine in a network namespace, whose loopback is slowed down to stand for a network; all
ranks share it. The engines take turns in the same processes; the baseline is a 16-bit step on the same link. Needs
Linux, `unshare` and `tc`.

    python benchmarks/gather.py [--ranks 2] [--links 0 1000 250] [--dtype bf16|fp32] [--repeats 7]
"""

import argparse
import fcntl
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from measure import interleaved, report, table

from launcher.config.file import parse_config
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks
from model.init import initial_value
from model.size import num_parameters
from model.transformer import ModelConfig
from quant.config import QuantConfig
from quant.linear import quantize_

MICRO_BATCHES, LENGTH = 4, 128
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "intermediate_size": 1408,
    "max_sequence_length": LENGTH,
}
VARIANTS = {"16-bit": ("weights", False), "ternary, weights": ("weights", True), "ternary, codes": ("codes", True)}
IN_NAMESPACE = "TRITRAIN_BENCHMARK_NAMESPACE"


def step_of(ranks: Ranks, gather: str, dtype: str, *, ternary: bool) -> Callable[[], None]:
    """A training step of an engine of its own, behind a barrier."""
    training = {"global_batch_sequences": MICRO_BATCHES * ranks.world_size, "micro_batch_sequences": 1}
    tree = {
        "run": {"name": "gather"},
        "model": MODEL,
        "data": {"sources": [{"path": "shards"}], "sequence_length": LENGTH},
        "training": training | {"compute_dtype": dtype},
        "optimizer": {"learning_rate": 1e-3},
        "phases": [{"precision": "16-bit", "steps": 1}, {"precision": "ternary", "steps": 1}],
        "engine": {"gather": gather},
    }
    config = parse_config(tree)
    plan = make_plan(config, ranks.world_size)
    engine = build_engine(plan, plan.phases[0], ranks)
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, 0, rows))
    if ternary:
        quantize_(engine.model, QuantConfig(), ranks.device)
    tokens = torch.arange(LENGTH + 1).expand(1, -1)

    def step() -> None:
        dist.barrier()
        for index in range(MICRO_BATCHES):
            loss = engine.forward(tokens[:, :-1], tokens[:, 1:]).loss / MICRO_BATCHES
            engine.backward(loss, last=index == MICRO_BATCHES - 1)
        engine.step(StepSizes(1e-3))

    for _ in range(2):
        step()
    return step


def bytes_on_loopback() -> int:
    [line] = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Measure, on every rank; the first writes the numbers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    ranks = Ranks(rank, options.ranks, rank, torch.device("cpu"))
    steps = {
        name: step_of(ranks, gather, options.dtype, ternary=ternary) for name, (gather, ternary) in VARIANTS.items()
    }
    megabytes = {}
    for name, step in steps.items():
        before = bytes_on_loopback()
        step()
        dist.barrier()
        megabytes[name] = (bytes_on_loopback() - before) / options.ranks / 1e6
    sections, numbers = [], {"megabytes_per_rank_and_step": megabytes}
    for link in options.links:
        if rank == 0:
            set_link(link)
        dist.barrier()
        seconds = interleaved(steps, options.repeats)
        sections.append(f"{f'{link} Mbit/s' if link else 'Loopback at full speed'}:\n\n{table(seconds, '16-bit')}")
        numbers[f"median_seconds_at_{link or 'full'}"] = {n: statistics.median(s) for n, s in seconds.items()}
    if rank == 0:
        sent = "\n".join(f"| {name} | {size:.1f} |" for name, size in megabytes.items())
        text = (
            f"{num_parameters(ModelConfig(**MODEL)):,} parameters on {options.ranks} ranks of one thread each, "
            f"{MICRO_BATCHES} micro-batches of {LENGTH} tokens a step, {options.dtype}, {options.repeats} rounds.\n\n"
            f"| | megabytes sent per rank and step |\n| --- | --- |\n{sent}\n\n" + "\n\n".join(sections)
        )
        report("gather", text, numbers)
    dist.barrier()
    dist.destroy_process_group()


def set_link(megabits: int) -> None:
    """Slow the loopback down to so many megabits a second, of all ranks together; 0: not at all."""
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=False, stderr=subprocess.DEVNULL)
    if megabits:
        shape = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "400ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", *shape], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--links", type=int, nargs="+", default=[0, 1000, 250], help="Mbit/s; 0 is no limit")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if IN_NAMESPACE not in os.environ:
        os.environ[IN_NAMESPACE] = "1"
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--net", sys.executable, *sys.argv])
    with socket.socket() as any_socket:  # `ip link set lo up`
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (options, folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
