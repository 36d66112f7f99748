"""What quantization does, measured: figures by hand, flips over ranks, nothing of the training touched."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_group
from test_launcher_engines import NUM_MICRO_BATCHES, NUM_SEQUENCES, batch, build


def gradient_norms(engines: list[str], dtypes: list[torch.dtype]) -> dict[str, Any]:
    results = {}
    for name in engines:
        for dtype in dtypes:
            engine = build(name, dtype)
            tokens, labels = batch(0)
            rank, size = dist.get_rank(), NUM_SEQUENCES // dist.get_world_size() // NUM_MICRO_BATCHES
            for index in range(NUM_MICRO_BATCHES):
                rows = slice((rank * NUM_MICRO_BATCHES + index) * size, (rank * NUM_MICRO_BATCHES + index + 1) * size)
                loss = engine.forward(tokens[rows], labels[rows]) / NUM_MICRO_BATCHES
                engine.backward(loss, last=index == NUM_MICRO_BATCHES - 1)
            parts = engine.gradient_squares()
            names = [parameter for parameter, _ in engine.model.named_parameters()]
            squares = torch.stack([parts.get(parameter, torch.zeros(())) for parameter in names])
            dist.all_reduce(squares)
            norm, _ = engine.step(1e-3)
            results[f"{name}/{dtype}"] = {"each": squares.sqrt(), "whole": norm}
    return results


def test_gradient_norms_of_parameters_make_up_the_whole_on_every_engine() -> None:
    engines = ["fsdp2", "zero-0", "zero-1", "zero-2", "zero-3"]
    results = run_group(2, gradient_norms, engines, [torch.float32, torch.bfloat16])[1]
    for key, result in results.items():
        assert result["each"].norm().item() == pytest.approx(result["whole"].item(), rel=1e-5), key
        expected = results[f"fsdp2/{key.split('/')[1]}"]["each"]
        torch.testing.assert_close(result["each"], expected, rtol=1e-4 if "32" in key else 3e-2, atol=1e-6)
