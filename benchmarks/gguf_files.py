"""What a ternary GGUF file gains: size, memory and speed of TQ2_0 against F16 and Q8_0, in llama.cpp on this CPU.

Models of two sizes with random weights are written in each type, and run in turns, each in a process of its own: a
prompt of 128 tokens, then 64 tokens one by one. Memory is the process's peak, the pages of the file included.

    python benchmarks/gguf_files.py --llama-python ENVIRONMENT/bin/python [--sizes 100M 1B] [--rounds 5] [--threads 1]

ENVIRONMENT has `llama-cpp-python` 0.3.36, built for this machine. The 1B models take 5 GB in `--folder` meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from math import prod
from pathlib import Path

import torch
from measure import report

from data.quickstart_corpus import read_standard_library
from data.tokenizer import train_tokenizer
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.source import Source
from launcher.formats.gguf_export import export_gguf
from launcher.formats.opened import Exportable
from model.size import parameter_shapes
from model.transformer import ModelConfig
from quant.config import BITNET
from quant.gguf import BlockType

SIZES = {
    "100M": ModelConfig(vocab_size=32_000, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048),
    "1B": ModelConfig(
        vocab_size=32_000, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, intermediate_size=8192
    ),
}
TYPES: tuple[BlockType, ...] = ("f16", "q8_0", "tq2_0", "q2_0", "tq1_0")
PROMPT_TOKENS, NEW_TOKENS = 128, 64


class RandomSource(Source):
    """Normal weights, made where they are read, so that no checkpoint is needed."""

    has_moments = False

    def __init__(self, model: ModelConfig) -> None:
        self.location, self.shapes = "random", parameter_shapes(model)
        self._generator = torch.Generator().manual_seed(0)

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        return torch.empty(length).normal_(std=0.02, generator=self._generator)

    def read_step(self, name: str) -> float:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the models, while they are measured")
    options = parser.parse_args()
    lines: list[str] = []
    numbers: dict[str, float] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(options, size, Path(folder), lines, numbers)
    report(
        "gguf",
        f"{options.threads} threads, {options.rounds} interleaved rounds, medians.\n\n" + "\n".join(lines),
        numbers,
    )


def measure(options: argparse.Namespace, size: str, folder: Path, lines: list[str], numbers: dict[str, float]) -> None:
    """Write and run the models of one size; adds a table and its numbers."""
    model, tokenizer = SIZES[size], folder / "tokenizer.model"
    train_tokenizer((text for path, text in read_standard_library() if path.startswith("json/")), "bpe:1000", tokenizer)
    for into in TYPES:
        opened = Exportable(RandomSource(model), model, Precision.full(BITNET, model.num_layers), tokenizer, None, None)
        export_gguf(opened, folder / f"{into}.gguf", into=into, tokenizer=tokenizer)
    runs: dict[str, list[dict[str, float]]] = {into: [] for into in TYPES}
    for _ in range(options.rounds):
        for into in TYPES:
            arguments = [folder / f"{into}.gguf", options.threads, PROMPT_TOKENS, NEW_TOKENS]
            script = Path(__file__).with_name("gguf_client.py")
            command = [options.llama_python, script, *map(str, arguments)]
            runs[into].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    parameters = sum(map(prod, parameter_shapes(model).values()))
    lines += [
        f"{size}: {parameters:,} parameters, embeddings F16 beside F16, else Q8_0.",
        "",
        "| | file MB | memory MB | prompt, tokens/s | decoding, tokens/s | x F16 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for into in TYPES:
        median = {key: statistics.median(run[key] for run in runs[into]) for key in runs[into][0]}
        median["file_mb"] = (folder / f"{into}.gguf").stat().st_size / 1e6
        numbers |= {f"{size}_{into}_{key}": round(value, 1) for key, value in median.items()}
        ratio = median["decode"] / numbers[f"{size}_f16_decode"]
        cells = [f"{median[key]:.1f}" for key in ("file_mb", "memory_mb", "prompt", "decode")]
        lines.append(f"| {into.upper()} | {' | '.join(cells)} | {ratio:.2f} |")
    lines.append("")


if __name__ == "__main__":
    main()
