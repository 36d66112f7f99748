"""What the ternary phase costs: a training step of one model, in 16 bits and ternary, eager and compiled.

A step is forward, backward and AdamW of one micro-batch in this process. All variants run in turns in one process; the
baseline is the 16-bit phase, eager.

    python benchmarks/step.py [--config configs/quickstart.yaml] [--dtype fp32|bf16] [--repeats 15] [key.sub=value ...]
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measure import interleaved, report, table

from launcher.config.file import load_config
from launcher.engine.adamw import build_adamw, parameter_groups
from model.init import initialize_
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import quantize_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--dtype", choices=DTYPES, help="by default the configuration's")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    dtype = options.dtype or config.training.compute_dtype
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, length = config.training.micro_batch_sequences, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (batch, length), device=device)
    labels = tokens.roll(-1, 1)

    def step_of(*, ternary: bool, compiled: bool) -> Callable[[], None]:
        model = Transformer(config.model)
        initialize_(model, 0)
        model = model.to(device=device, dtype=DTYPES[dtype])
        if ternary:
            quantize_(model, QuantConfig())
        if compiled:
            for block in model.model.layers:
                block.compile()
        named = ((name, parameter.ndim, parameter) for name, parameter in model.named_parameters())
        optimizer = build_adamw(parameter_groups(named, config.optimizer), config.optimizer, fused=True)

        def step() -> None:
            model(tokens, labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        return step

    variants = {
        f"{'ternary' if ternary else '16-bit'}, {'compiled' if compiled else 'eager'}": step_of(
            ternary=ternary, compiled=compiled
        )
        for compiled in (False, True)
        for ternary in (False, True)
    }
    seconds = interleaved(variants, options.repeats, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        mode: round(medians[f"ternary, {mode}"] / medians[f"16-bit, {mode}"], 3) for mode in ("eager", "compiled")
    }
    text = (
        f"One step of {config.run.name}'s model on {batch} x {length} tokens in {dtype}, {options.repeats} rounds.\n\n"
        + table(seconds, "16-bit, eager")
        + f"\n\nTernary over 16-bit: {ratios['eager']:.2f} eager, {ratios['compiled']:.2f} compiled."
    )
    report(f"step-{device.type}-{dtype}", text, {"median_seconds": medians, "ternary_over_16_bit": ratios})


if __name__ == "__main__":
    main()
