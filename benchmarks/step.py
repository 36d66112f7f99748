"""What the ternary phase costs: a training step of one model, in 16 bits and ternary, eager and compiled.

A step is forward, backward and AdamW of one micro-batch in this process. All variants run in turns in one process; the
baseline is the 16-bit phase, eager.

    python benchmarks/step.py [--config configs/quickstart.yaml] [--dtype fp32|bf16] [--repeats 15] [key.sub=value ...]
"""

import statistics
from collections.abc import Callable

import torch
from measure import interleaved, parser_of, report, table
from torch import nn

from launcher.config.automatic import made_concrete
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.engine.adamw import build_adamw, parameter_groups
from launcher.run.automatic import device_of
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import quantize_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = {
    f"{precision}, {mode}": {"ternary": precision == "ternary", "compiled": mode == "compiled"}
    for mode in ("eager", "compiled")
    for precision in ("16-bit", "ternary")
}
"""By name, how `step_of` makes a step."""


def step_of(config: Config, dtype: str, device: torch.device, *, ternary: bool, compiled: bool) -> Callable[[], None]:
    """A training step of a model of its own, which has run three times."""
    shape = config.training.micro_batch_sequences, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
    labels = tokens.roll(-1, 1)
    with device:
        model = Transformer(config.model).to(DTYPES[dtype])
    for parameter in model.parameters():  # on the device: `initialize_` takes a minute for a billion
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
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


def main() -> None:
    parser = parser_of(__doc__, "configs/quickstart.yaml")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the configuration's")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or made_concrete(config, device_of(device))[0].training.compute_dtype
    variants = {name: step_of(config, dtype, device, **how) for name, how in VARIANTS.items()}
    seconds = interleaved(variants, options.repeats, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        mode: round(medians[f"ternary, {mode}"] / medians[f"16-bit, {mode}"], 3) for mode in ("eager", "compiled")
    }
    text = (
        f"One step of {config.run.name}'s model on {config.training.micro_batch_sequences} x "
        f"{config.data.sequence_length} tokens in {dtype}, {options.repeats} rounds.\n\n"
        + table(seconds, "16-bit, eager")
        + f"\n\nTernary over 16-bit: {ratios['eager']:.2f} eager, {ratios['compiled']:.2f} compiled."
    )
    numbers = {"median_seconds": medians, "ternary_over_16_bit": ratios}
    report(f"step-{config.run.name}-{device.type}-{dtype}", text, numbers)


if __name__ == "__main__":
    main()
