"""What the ternary phase costs: a training step of one model, in 16 bits and ternary, eager and compiled.

A step is forward, backward and AdamW of one micro-batch in this process. All variants run in turns in one process; the
baseline is the 16-bit phase, eager. With `--peers` it is a step of one block, ours with each ingredient in turn beside
other ternary training (`peers.py`), the baseline is the compiled 16-bit step, and times are of the processor.

    python benchmarks/step.py [--config configs/quickstart.yaml] [--dtype fp32|bf16] [--repeats 15] [key.sub=value ...]
    python benchmarks/step.py --peers [--width 1024] [--tokens 1024] [--dtype fp32|bf16] [--repeats 15] [--only NAME]
"""

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import peers
import torch
from measure import instructions, interleaved, parser_of, report, table
from torch import nn

from launcher.config.automatic import made_concrete
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.engine.adamw import build_adamw, parameter_groups
from launcher.engine.compiling import compile_blocks_, compiled_function
from launcher.run.automatic import device_of
from model.config import ModelConfig
from model.loss import gradient_of_logits
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.keeper import CodeKeeper
from quant.linear import quantize_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS: dict[str, dict[str, Any]] = {
    "16-bit, eager": {"backward": None, "compiled": False},
    "ternary, eager": {"backward": "exact", "compiled": False},
    "16-bit, compiled": {"backward": None, "compiled": True},
    "ternary, compiled": {"backward": "exact", "compiled": True},
    "ternary int8-input, compiled": {"backward": "int8-input", "compiled": True},
    "ternary int8, compiled": {"backward": "int8", "compiled": True},
}
"""By name, how `step_of` makes a step."""


def step_of(
    config: Config, dtype: str, device: torch.device, *, backward: str | None, compiled: bool
) -> Callable[[], None]:
    """A training step of a model of its own, which has run three times; in 16 bits without a ``backward``."""
    shape = config.training.micro_batch_sequences, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
    labels = tokens.roll(-1, 1)
    with device:
        model = Transformer(config.model).to(DTYPES[dtype])
    for parameter in model.parameters():  # on the device: `initialize_` takes a minute for a billion
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    keeper = None
    if backward is not None:
        quantize_(model, QuantConfig(backward=backward))
        keeper = CodeKeeper(model, whole=True, compiled=compiled)
    if compiled:
        compile_blocks_(list(model.model.layers))
        model.gradient_of_logits = compiled_function(gradient_of_logits)
    named = ((name, parameter.ndim, parameter) for name, parameter in model.named_parameters())
    optimizer = build_adamw(parameter_groups(named, config.optimizer), config.optimizer, fused=True)

    def step() -> None:
        if keeper is not None:
            keeper.fresh = False
            keeper.prepare()
        model(tokens, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


def compare_with_peers(options: argparse.Namespace, device: torch.device) -> None:
    """Measure a block's step, ours and others'."""
    width, dtype = options.width, options.dtype or "fp32"
    shape = ModelConfig(
        vocab_size=64,
        hidden_size=width,
        num_layers=1,
        num_heads=max(1, width // 64),
        intermediate_size=width * 11 // 4,
        max_sequence_length=512,
    )
    if device.type == "cpu":
        torch.set_num_threads(1)  # processor time of several threads counts their waiting
    steps, left_out = {}, {}
    for name in options.only or peers.VARIANTS:
        try:
            steps[name] = peers.step_of(name, shape, options.tokens, DTYPES[dtype], device)
        except Exception as error:  # whatever another package raises
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    runs = {name: step.run for name, step in steps.items()}
    seconds = interleaved(runs, options.repeats, device, of_process=device.type == "cpu")
    baseline = next(iter(steps))
    base, base_bytes = statistics.median(seconds[baseline]), steps[baseline].saved_bytes
    lines = ["| | median ms | fastest to slowest | x baseline | MB kept for backward | x | graph calls |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, step in steps.items():
        values = [1e3 * value for value in seconds[name]]
        median = statistics.median(values)
        lines.append(
            f"| {name} | {median:.1f} | {min(values):.1f} to {max(values):.1f} | {median / base / 1e3:.2f} "
            f"| {step.saved_bytes / 1e6:.1f} | {step.saved_bytes / base_bytes:.2f} | {step.graph_calls or ''} |"
        )
    lines += [f"| {name} | not measured: {reason} | | | | | |" for name, reason in left_out.items()]
    text = (
        f"Forward, backward and AdamW of one block of width {width} on {options.tokens:,} tokens in {dtype}, "
        f"{options.repeats} rounds. All but `eager` is compiled; ternary is BitNet b1.58, with int8 inputs.\n\n"
        + "\n".join(lines)
    )
    numbers = {
        name: {
            "median_seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(seconds[name]) / base,
            "saved_bytes": step.saved_bytes,
            "graph_calls": step.graph_calls,
        }
        for name, step in steps.items()
    }
    packages = tuple(name for name in ("torch", "torchao", "bitlinear", "onebitllms") if find_spec(name))
    where = f"cpu-{instructions().lower()}" if device.type == "cpu" else device.type
    report(f"peers-{width}-{where}-{dtype}", text, numbers | {"not measured": left_out}, packages)


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the configuration's")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", action="store_true", help="one block, beside others")
    parser.add_argument("--width", type=int, default=1024, help="of the block")
    parser.add_argument("--tokens", type=int, default=1024, help="of the block's step")
    parser.add_argument("--only", nargs="+", choices=peers.VARIANTS, metavar="NAME", help="the first is the baseline")
    options = parser.parse_intermixed_args()
    if options.peers:
        compare_with_peers(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    config = load_config(options.config, options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or made_concrete(config, device_of(device))[0].training.compute_dtype
    variants = {name: step_of(config, dtype, device, **how) for name, how in VARIANTS.items()}
    seconds = interleaved(variants, options.repeats, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: round(medians[name] / medians["16-bit, " + name.rpartition(", ")[2]], 3)
        for name, how in VARIANTS.items()
        if how["backward"]
    }
    text = (
        f"One step of {config.run.name}'s model on {config.training.micro_batch_sequences} x "
        f"{config.data.sequence_length} tokens in {dtype}, {options.repeats} rounds.\n\n"
        + table(seconds, "16-bit, eager")
        + "\n\nOver 16-bit in the same mode: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        + "."
    )
    numbers = {"median_seconds": medians, "ternary_over_16_bit": ratios}
    report(f"step-{config.run.name}-{device.type}-{dtype}", text, numbers)


if __name__ == "__main__":
    main()
