"""Count the bytes that real ranks send in a step, by what the kernel counts on `lo`; to be run in a network namespace.

    unshare --user --map-root-user --net python tests/support/counting.py '[["fsdp2", {"name": "fsdp2"}, 2], ...]'

Prints a JSON object for every job and precision: bytes per rank and step as counted and as modeled. The count is of
steps in the midst of a run, so that setting up does not belong to it; headers of TCP and IP do (0.1 % with lo's frames
of 64 KiB).
"""

import fcntl
import json
import os
import socket
import struct
import sys
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks

MICRO_BATCHES, STEPS = 2, 2
TREE: dict[str, Any] = {
    "run": {"name": "counted"},
    "model": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 512,
        "max_sequence_length": 32,
        "tie_embeddings": False,
    },
    "data": {"sources": [{"path": "shards"}], "sequence_length": 32},
    "optimizer": {"learning_rate": 1e-3},
    "phases": [{"precision": "16-bit", "steps": 500}, {"precision": "ternary", "steps": 500}],
}


def bring_up_loopback() -> None:
    """What `ip link set lo up` does: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))


def bytes_sent_so_far() -> int:
    """Bytes that `lo` has sent, of all ranks together."""
    with open("/proc/net/dev") as interfaces:
        [line] = [line for line in interfaces if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def count(rank: int, world_size: int, engine_tree: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Bytes per rank and step, counted and modeled, of each precision."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from launcher.config.file import parse_config
    from launcher.engine.build import build_engine
    from launcher.engine.contract import load_weights
    from launcher.plan.memory import gathers_codes
    from launcher.plan.plan import make_plan
    from launcher.plan.schedule import StepSizes
    from launcher.plan.traffic import bytes_sent
    from launcher.process.ranks import Ranks
    from launcher.watch.stopping import StopRequest
    from model.init import initial_value
    from quant.config import QuantConfig
    from quant.linear import quantize_, set_strength_

    batch = {"global_batch_sequences": world_size * MICRO_BATCHES, "micro_batch_sequences": 1, "compute_dtype": "bf16"}
    config = parse_config(TREE | {"training": batch, "engine": engine_tree})
    plan, ranks = make_plan(config, world_size), Ranks(rank, world_size, rank, torch.device("cpu"))
    engine = build_engine(plan, plan.phases[0], ranks)
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, 0, rows))
    tokens = torch.arange(33).expand(1, -1)

    def step() -> None:
        for index in range(MICRO_BATCHES):
            loss = engine.forward(tokens[:, :-1], tokens[:, 1:]).loss / MICRO_BATCHES
            engine.backward(loss, last=index == MICRO_BATCHES - 1)
        engine.step(StepSizes(1e-3))
        StopRequest().agree(ranks)

    def counted() -> float:
        for _ in range(2):  # DeepSpeed learns the order of the layers in its first pass
            step()
        dist.barrier()
        before = bytes_sent_so_far()
        dist.barrier()
        for _ in range(STEPS):
            step()
        dist.barrier()
        return (bytes_sent_so_far() - before) / STEPS / world_size

    found = {"16-bit": (counted(), sum(bytes_sent(plan, backend="gloo").values()))}
    dist.barrier()
    quantize_(engine.model, QuantConfig(), torch.device("cpu"))
    set_strength_(engine.model, 1.0)
    in_codes = gathers_codes(plan)
    found["ternary"] = (counted(), sum(bytes_sent(plan, backend="gloo", codes=in_codes).values()))
    dist.barrier()
    return found


if __name__ == "__main__":
    bring_up_loopback()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name, tree, num_ranks in json.loads(sys.argv[1]):
        for precision, (counted_bytes, model_bytes) in run_ranks(num_ranks, count, tree)[0].items():
            row = {"engine": name, "ranks": num_ranks, "precision": precision}
            sys.stdout.write(json.dumps(row | {"counted": counted_bytes, "model": model_bytes}) + "\n")
            sys.stdout.flush()
