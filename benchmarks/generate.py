"""Memory and speed of generation: packed ternary layers, dequantized weights in plain layers, and llama.cpp.

A model with random weights is written once. Each variant is loaded in a process of its own, for its peak memory; then
all are timed in one process, in turns: tokens at batch 1 with a key-value cache, and a prompt. llama.cpp takes part if
`--llama-python ENVIRONMENT/bin/python` names an environment that has `llama-cpp-python`. On a machine that is busy with
other programs, `--threads 1 --of-process` counts the seconds of this process alone.

    python benchmarks/generate.py [--size 100m] [--tokens 16] [--prompt 128] [--repeats 5] [--threads 2] [--device cpu]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from measure import interleaved, report

from launcher.checkpoint.source import Source
from launcher.formats.hf_folder import write_hf
from launcher.inference.llama import LlamaModel, load_llama
from launcher.inference.load import load_model
from launcher.process.console import human_bytes
from model.size import num_parameters, parameter_shapes
from model.transformer import ModelConfig, Transformer
from quant.linear import dequantize_, quantized_layers
from quant.packed import memory_bytes

SMALL = ModelConfig(
    vocab_size=32_000, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048, max_sequence_length=1024
)
SIZES = {
    "tiny": replace(SMALL, vocab_size=1024, hidden_size=128, num_layers=2, num_heads=4, intermediate_size=384),
    "100m": SMALL,
    "1b": replace(SMALL, hidden_size=2048, num_layers=16, num_heads=32, intermediate_size=8192),
}
VARIANTS = {f"{kind}, {dtype}": (kind, dtype) for kind in ("packed", "dequantized") for dtype in ("bf16", "fp32")}
LLAMA = "llama.cpp"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
"""Says to whoever loads the folder that its weights are to be computed with as codes."""


class RandomWeights(Source):
    """Normal weights, drawn when they are read."""

    location, has_moments = "random weights", False

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = parameter_shapes(config)

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Ones for norms."""
        return torch.ones(length) if "norm" in name else 0.02 * torch.randn(length)

    def read_step(self, name: str) -> float:
        """There are none."""
        raise NotImplementedError


def load(folder: Path, device: str, kind: str, dtype: str) -> Transformer | LlamaModel:
    if kind == LLAMA:
        return load_llama(str(folder))
    model = load_model(folder, dtype=DTYPES[dtype], device=device, packed=kind == "packed").model
    if kind == "dequantized":
        for layer in quantized_layers(model).values():
            codes_OI, level = layer.weight_codes()
            layer.weight.copy_(codes_OI * level)
        dequantize_(model)
    return model


def peak_bytes(folder: Path, device: str, kind: str, dtype: str) -> int:
    """Memory of the device that loading needs at its highest, in a process that has imported all it needs."""
    before = psutil.Process().memory_info().rss
    load(folder, device, kind, dtype)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def bytes_of(model: Transformer | LlamaModel) -> int:
    return model.weights_bytes if isinstance(model, LlamaModel) else memory_bytes(model)


def decoder(model: Transformer | LlamaModel, prompt_BT: torch.Tensor, num_tokens: int) -> Callable[[], object]:
    """Writes tokens after a prompt that is in the cache already."""
    if isinstance(model, LlamaModel):
        prompt = prompt_BT[0].tolist()
        return lambda: [model.next_logits(prompt + prompt[:1] * count) for count in range(1, num_tokens + 1)]
    cache = model.new_cache(1, prompt_BT.shape[1] + num_tokens)
    model.next_logits(prompt_BT, cache)

    def run() -> None:
        for layer in cache.layers:
            layer.num_tokens = prompt_BT.shape[1]
        for _ in range(num_tokens):
            model.next_logits(prompt_BT[:, :1], cache)

    return run


def reader(model: Transformer | LlamaModel, prompt_BT: torch.Tensor) -> Callable[[], object]:
    """Reads a prompt."""
    if isinstance(model, LlamaModel):
        prompt = prompt_BT[0].tolist()

        def read() -> None:
            model.llama.reset()
            model.next_logits(prompt)

        return read
    return lambda: model.next_logits(prompt_BT, model.new_cache(1, prompt_BT.shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--of-process", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("FOLDER", "KIND", "DTYPE"), help="used by the script itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants: dict[str, Sequence[str]] = dict(VARIANTS)
    with_llama = []
    if options.llama_python:
        asked = [options.llama_python, "-c", "import site; print(site.getsitepackages()[0])"]
        sys.path.append(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
        variants[LLAMA], with_llama = (LLAMA, "f16"), ["--llama-python", str(options.llama_python)]
    if options.peak:
        print(peak_bytes(Path(options.peak[0]), options.device, *options.peak[1:]))
        return
    torch.manual_seed(0)
    config = SIZES[options.size]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        write_hf(RandomWeights(config), config, folder)
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"quantization_config": ONLINE}))
        peaks = {}
        for name, variant in variants.items():
            command = [sys.executable, __file__, "--device", options.device, *with_llama]
            command += ["--peak", str(folder), *variant]
            peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        models = {name: load(folder, options.device, *variant) for name, variant in variants.items()}
    device = torch.device(options.device)
    prompt_BT = torch.randint(config.vocab_size, (1, options.prompt)).to(device)
    decoders = {name: decoder(model, prompt_BT, options.tokens) for name, model in models.items()}
    readers = {name: reader(model, prompt_BT) for name, model in models.items()}
    for run in (*decoders.values(), *readers.values()):
        run()
    decoding = interleaved(decoders, options.repeats, device, of_process=options.of_process)
    reading = interleaved(readers, options.repeats, device, of_process=options.of_process)
    rows = [
        "| | weights | peak while loading | tokens/s, batch 1 | prompt tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    numbers = {}
    for name, model in models.items():
        speeds = options.tokens / statistics.median(decoding[name]), options.prompt / statistics.median(reading[name])
        numbers[name] = {"weights_bytes": bytes_of(model), "peak_bytes": peaks[name], "tokens_per_second": speeds}
        sizes = human_bytes(bytes_of(model)), human_bytes(peaks[name])
        rows.append(f"| {name} | {sizes[0]} | {sizes[1]} | {speeds[0]:.3g} | {speeds[1]:.3g} |")
    about = (
        f"{num_parameters(config):,} parameters, prompt of {options.prompt} tokens, {options.tokens} tokens after it, "
    )
    about += f"{options.threads} threads; medians of {options.repeats}, taken in turns"
    about += ", in seconds of this process's threads." if options.of_process else "."
    report(f"generate-{options.size}-{options.device}", "\n".join([about, "", *rows]), numbers)


if __name__ == "__main__":
    main()
