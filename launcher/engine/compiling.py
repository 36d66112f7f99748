"""Compile a model's blocks, and know whether what was compiled is what runs.

`torch.compile` falls back to plain Python without an error: where a block cannot be traced as one graph, or has been
compiled for too many shapes and modes. So each call of a compiled graph is counted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_GRAPHS = 64
"""Graphs of one function, of which a run needs a dozen: by mode, shape, dtype, and with gradients or without."""

BACKEND = "inductor"

num_calls = 0
"""Calls of compiled graphs in this process, forward passes alone."""


def compile_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Compile each block; all of them share their graphs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for block in blocks:
        block.compile(backend=counted, dynamic=False)


@functools.cache
def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled; its calls are not counted."""
    return torch.compile(function, backend=BACKEND, dynamic=False)


def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """`BACKEND`, with its calls counted."""
    compiled = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

    def call(*arguments: Any) -> Any:
        global num_calls
        num_calls += 1
        return compiled(*arguments)

    return call


def compile_report(step: int, calls: int, expected: int) -> str:
    """What to say of the graph calls of a step.

    Args:
        step: its number, counted from 1.
        calls: that were counted.
        expected: one for each block and micro-batch.
    """
    if calls == expected:
        return f"step {step} is compiled: {calls} graph calls, one for each block and micro-batch"
    how = "the model runs eager" if calls == 0 else "parts of the model run eager"
    return (
        f"WARNING: training.compile is on, but {how}: step {step} has {calls} graph calls, where {expected} were "
        "expected, one for each block and micro-batch; TORCH_LOGS=graph_breaks,recompiles says why"
    )
