"""Where a training step's time goes on a GPU: its kernels by kind and by name, in 16 bits and ternary.

The step is that of `step.py`. Beside what was measured stand floors: the operations of its products at the rates that
large products reach on this machine, and the bytes of the optimizer at the rate of a large copy.

    python benchmarks/kernels.py [--config configs/llama-1b.yaml] [--dtype bf16] [--top 12] [key.sub=value ...]
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from measure import parser_of, report, seconds_of
from step import DTYPES, VARIANTS, step_of
from torch.autograd import DeviceType

from launcher.config.file import load_config
from launcher.config.sections import Config
from model.size import num_linear_parameters, num_parameters

KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "products of integers": r"i8|s8|int8|imma|igemm|_streamed|_by_pointers",
    "rounding by our own kernels": r"_column_peaks|_quantize_|_transposed|_pack_rows|_row_sums",
    "products in 16 bits": r"gemm|nvjet|cutlass|xmma|cublas",
    "optimizer": r"multi_tensor|adam",
    "fused by Inductor": r"triton_",
    "reductions": r"reduce|norm|softmax|cumsum|sort|scatter|gather|index|embedding",
    "element by element": r"elementwise|vectorized|copy|Memcpy|Memset|fill|cat",
}
"""By the first of these that is found in a kernel's name."""


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def kernels_of(step: Callable[[], None], steps: int = 3) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls of each kernel in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / 1e3 / steps, event.count / steps)
        for event in profile.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total and not event.is_user_annotation
    }


def rate(run: Callable[[], object], amount: float) -> float:
    """Amount a second of the median of 20 runs, after 3 that warm up."""
    device = torch.device("cuda")
    for _ in range(3):
        run()
    return amount / statistics.median(seconds_of(run, device) for _ in range(20))


def ceilings() -> dict[str, float]:
    """What this machine reaches: operations a second of products, bytes a second of a copy."""
    size = 8192
    x, w = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    xi, wi = ((tensor * 40).clamp(-127, 127).to(torch.int8) for tensor in (x, w))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return {
        "bf16_flops": rate(lambda: x @ w.T, 2 * size**3),
        "int8_ops": rate(lambda: torch._int_mm(xi, wi.T), 2 * size**3),
        "copy_bytes": rate(lambda: target.copy_(source), 8 * source.numel()),
    }


def floors(config: Config, found: dict[str, float]) -> dict[str, float]:
    """Milliseconds that no step takes less than, by what they are for."""
    model, length = config.model, config.data.sequence_length
    tokens = config.training.micro_batch_sequences * length
    linear = 2 * tokens * num_linear_parameters(model)
    head = 2 * tokens * model.vocab_size * model.hidden_size
    attention = (
        2 * tokens * length * model.num_heads * model.head_width * model.num_layers
    )  # causal: half of both products
    bf16 = found["bf16_flops"]
    return {
        "layers' products forward, bf16": 1e3 * linear / bf16,
        "layers' products forward, int8": 1e3 * linear / found["int8_ops"],
        "layers' products backward, bf16": 2e3 * linear / bf16,
        "head, three products": 3e3 * head / bf16,
        "attention, forward and backward": 3.5e3 * attention / bf16,
        "optimizer, 14 bytes a parameter in bf16": 14e3 * num_parameters(model) / found["copy_bytes"],
    }


def main() -> None:
    parser = parser_of(__doc__, "configs/llama-1b.yaml")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--top", type=int, default=12)
    options = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    config, device = load_config(options.config, options.overrides), torch.device("cuda")
    kinds: dict[str, dict[str, float]] = {}
    walls, tables = {}, []
    for name, how in VARIANTS.items():
        if not how["compiled"]:  # thousands of small kernels, of which nothing is to be learned
            continue
        step = step_of(config, options.dtype, device, **how)
        walls[name] = 1e3 * statistics.median(seconds_of(step, device) for _ in range(7))
        kernels = kernels_of(step)
        kinds[name] = defaultdict(float)
        for kernel, (milliseconds, _) in kernels.items():
            kinds[name][kind_of(kernel)] += milliseconds
        longest = sorted(kernels.items(), key=lambda item: -item[1][0])[: options.top]
        rows = [
            f"| {ms:.2f} | {calls:.0f} | {kind_of(kernel)} | `{re.sub('[|`]', ' ', kernel)[:110]}` |"
            for kernel, (ms, calls) in longest
        ]
        head = ["", f"{name}:", "", "| ms a step | calls | kind | kernel |", "| --- | --- | --- | --- |"]
        tables += [*head, *rows]
        del step
        torch.cuda.empty_cache()
    found = ceilings()
    least = floors(config, found)
    present = [kind for kind in (*KINDS, "other") if any(kinds[name][kind] for name in kinds)]
    summary = ["| ms a step | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for kind in present:
        summary.append(f"| {kind} | " + " | ".join(f"{kinds[name][kind]:.2f}" for name in kinds) + " |")
    summary.append("| all kernels | " + " | ".join(f"{sum(kinds[name].values()):.2f}" for name in kinds) + " |")
    summary.append("| wall clock | " + " | ".join(f"{walls[name]:.2f}" for name in kinds) + " |")
    about = (
        f"One step of {config.run.name}'s model on {config.training.micro_batch_sequences} x "
        f"{config.data.sequence_length} tokens in {options.dtype}. Large products reach "
        f"{found['bf16_flops'] / 1e12:.0f} TFLOP/s in bf16 and {found['int8_ops'] / 1e12:.0f} TOP/s in int8, a copy "
        f"{found['copy_bytes'] / 1e12:.2f} TB/s. At these rates:"
    )
    bounds = ["| floor | ms |", "| --- | --- |", *(f"| {name} | {ms:.2f} |" for name, ms in least.items())]
    text = "\n".join([about, "", *bounds, "", *summary, *tables])
    numbers = {"ceilings": found, "floors_ms": least, "kernels_ms": kinds, "wall_ms": walls}
    report(f"kernels-{config.run.name}-{options.dtype}", text, numbers)


if __name__ == "__main__":
    main()
