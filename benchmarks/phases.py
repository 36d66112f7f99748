"""A whole optimizer step of each phase through the engine, as a run takes it: time, tokens a second, memory.

One engine on one model goes through all phases in turns: 16 bits, the midst of a ramp, and ternary with each backward
pass. A step is that of a run: tokens from the host, all micro-batches, the codes made anew, clipping, AdamW on fp32
weights. On a GPU the peak of allocated memory stands beside what `tritrain plan` estimates.

    python benchmarks/phases.py [--config configs/quickstart.yaml] [--repeats 9] [--only NAME] [key.sub=value ...]
"""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measure import interleaved, parser_of, report
from torch import nn

from launcher.config.file import load_config
from launcher.engine.build import build_engine
from launcher.engine.contract import Engine, load_weights
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import process_group
from launcher.run.automatic import concrete
from launcher.training.meter import peak_flops_per_second
from launcher.training.step import accumulate_gradients
from model.init import initial_value
from model.size import num_parameters
from quant.config import QuantConfig
from quant.linear import dequantize_, quantize_, quantized_layers, set_strength_

PHASES: dict[str, tuple[str | None, float]] = {
    "16-bit": (None, 0.0),
    "ramp": ("exact", 0.5),
    "ternary": ("exact", 1.0),
    "ternary, int8-input": ("int8-input", 1.0),
    "ternary, int8": ("int8", 1.0),
}
"""By name, `quantization.backward` and the strength. The first is the baseline."""


def enter(engine: Engine, quantization: QuantConfig, backward: Any, strength: float) -> None:
    """Make the engine's model one of this phase."""
    if quantized_layers(engine.model):
        dequantize_(engine.model)
    if backward is not None:
        quantize_(engine.model, replace(quantization, backward=backward), engine.device)
        set_strength_(engine.model, strength)
    engine.refresh_weights()


def first_value(name: str, shape: tuple[int, ...], rows: range, device: torch.device, **how: Any) -> torch.Tensor:
    """Weights as a run begins with; on a GPU drawn there, where a billion takes no minute."""
    if device.type == "cpu" or len(shape) == 1:
        return initial_value(name, shape, rows=rows, **how)
    return nn.init.normal_(torch.empty(len(rows), *shape[1:], device=device), std=0.02)


def take_step(engine: Engine, tokens: torch.Tensor, num_micro_batches: int) -> None:
    """An optimizer step on as many micro-batches of the same tokens, [B, T]."""
    batches = ((tokens, tokens.roll(-1, 1)) for _ in range(num_micro_batches))
    accumulate_gradients(engine, batches, num_micro_batches)
    engine.step(StepSizes(1e-5))


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=PHASES, metavar="NAME", help="the first is the baseline")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    names = options.only or list(PHASES)
    with process_group(600) as ranks:
        plan = make_plan(concrete(config, ranks)[0], ranks.world_size)
        quantization = next((phase.quantization for phase in plan.phases if phase.quantization), QuantConfig())
        engine = build_engine(plan, None, ranks)
        how = {"config": config.model, "seed": config.run.seed}
        load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, ranks.device, **how))
        shape = config.training.micro_batch_sequences, config.data.sequence_length
        tokens = torch.randint(0, config.model.vocab_size, shape)
        step = partial(take_step, engine, tokens, plan.most_micro_batches)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0)
        on_gpu = ranks.device.type == "cuda"
        for turn in range(options.repeats + 1):
            for name in names:
                enter(engine, quantization, *PHASES[name])
                for _ in range(1 if turn else 3):  # what is compiled and chosen, and codes in the first layout
                    step()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                if turn:
                    seconds[name] += interleaved({name: step}, 1, ranks.device)[name]
                if on_gpu:
                    peaks[name] = torch.cuda.max_memory_allocated()
    estimate = sum(memory_bytes_per_rank(plan).values())
    num_tokens = plan.most_micro_batches * tokens.numel()
    peak_flops = peak_flops_per_second(ranks.device)
    base = statistics.median(seconds[names[0]])
    lines = ["| | median ms | fastest to slowest | x | tokens/s | MFU | peak GiB |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name in names:
        median, values = statistics.median(seconds[name]), [1e3 * value for value in seconds[name]]
        mfu = f"{num_tokens / median * plan.flops_per_token_at(0) / peak_flops:.1%}" if peak_flops else ""
        lines.append(
            f"| {name} | {1e3 * median:.1f} | {min(values):.1f} to {max(values):.1f} | {median / base:.2f} "
            f"| {num_tokens / median:,.0f} | {mfu} | {f'{peaks[name] / 2**30:.2f}' if on_gpu else ''} |"
        )
    concrete_training = plan.config.training
    text = (
        f"One optimizer step of {config.run.name}'s model ({num_parameters(config.model) / 1e6:.0f} M parameters) on "
        f"{plan.most_micro_batches} x {shape[0]} x {shape[1]} tokens in {concrete_training.compute_dtype} with "
        f"{config.engine.name}, {'compiled' if concrete_training.compile else 'eager'}, {options.repeats} rounds in "
        f"turns.\n\n" + "\n".join(lines)
    )
    if on_gpu:
        text += f"\n\n`tritrain plan` estimates {estimate / 2**30:.2f} GiB for the whole course."
    numbers = {"median_seconds": {name: statistics.median(seconds[name]) for name in names}, "peak_bytes": peaks}
    report(
        f"phases-{config.run.name}-{ranks.device.type}-{concrete_training.compute_dtype}",
        text,
        numbers | {"estimated_bytes": estimate, "tokens": num_tokens},
    )


if __name__ == "__main__":
    main()
