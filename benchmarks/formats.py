"""Every export format in the program that it is for, on this CPU: size, time to the first token, memory and speed.

One model with random weights is written in each format, beside it in 16, 8 and 4 bits for llama.cpp. They run in turns,
each in a process of its own: a prompt of 16 tokens, then tokens one by one. Memory is the process's peak, libraries and
the pages of files included.

    python benchmarks/formats.py --llama-python ENVIRONMENT/bin/python [--sizes 100M] [--rounds 3] [--threads 1]

ENVIRONMENT has `llama-cpp-python` 0.3.36, built for this machine. The environment of the command has Transformers with
`accelerate` and `compressed-tensors`, `onnxruntime`, and `mlx`, `mlx-cpu` and `mlx-lm`; what is missing is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf_files import SIZES, RandomSource
from measure import report

from data.quickstart_corpus import read_standard_library
from data.tokenizer import train_tokenizer
from launcher.checkpoint.manifest import Precision
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from launcher.formats.opened import Exportable
from model.size import parameter_shapes
from model.transformer import ModelConfig
from quant.config import BITNET

QUANTIZE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = 2, 2
assert not llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options)
"""
Write = Callable[[Exportable, Path], object]


class Variant(NamedTuple):
    """An export, and what runs it."""

    runtime: str
    write: Write


def variants(tokenizer: Path, llama_python: Path) -> dict[str, Variant]:
    """All of them, by the options of `tritrain export`."""

    def folder(**options: Any) -> Write:
        return partial(export_hf, tokenizer=tokenizer, **options)

    def file(into: Any) -> Variant:
        return Variant("llama.cpp", partial(export_gguf, into=into, tokenizer=tokenizer))

    def q4_0(opened: Exportable, to: Path) -> None:
        export_gguf(opened, to.with_suffix(".f16"), into="f16", tokenizer=tokenizer)
        subprocess.run([llama_python, "-c", QUANTIZE, to.with_suffix(".f16"), to], check=True, capture_output=True)
        to.with_suffix(".f16").unlink()

    packed = {"weights": "packed"}
    compressed = {"weights": "compressed-tensors"}
    return {
        "gguf --type f16": file("f16"),
        "gguf --type q8_0": file("q8_0"),
        "q4_0, by llama.cpp from f16": Variant("llama.cpp", q4_0),
        "gguf --type tq2_0": file("tq2_0"),
        "gguf --type q2_0": file("q2_0"),
        "gguf --type tq1_0": file("tq1_0"),
        "hf --weights dequantized": Variant("Transformers", folder(weights="dequantized")),
        "hf-ternary": Variant("Transformers", folder(**packed)),
        "hf-ternary --linear-class autobitlinear": Variant(
            "Transformers", folder(**packed, linear_class="autobitlinear")
        ),
        "compressed-tensors": Variant("Transformers", folder(**compressed, inputs="none")),
        "compressed-tensors --activations int8": Variant("Transformers", folder(**compressed, inputs="int8")),
        "mlx": Variant("mlx-lm", folder(weights="mlx")),
        "onnx": Variant("ONNX Runtime", partial(export_onnx, tokenizer=tokenizer)),
        "onnx --activations none": Variant("ONNX Runtime", partial(export_onnx, inputs="none", tokenizer=tokenizer)),
    }


PACKAGES = {"Transformers": "transformers", "mlx-lm": "mlx_lm", "ONNX Runtime": "onnxruntime"}


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in ([place] if place.is_file() else place.iterdir()))


def measure(options: argparse.Namespace, size: str, folder: Path, lines: list[str], numbers: dict[str, Any]) -> None:
    """Write and run the model of one size; adds a table and its numbers."""
    model, tokenizer = SIZES[size], folder / "tokenizer.model"
    train_tokenizer((text for path, text in read_standard_library() if path.startswith("json/")), "bpe:1000", tokenizer)
    chosen = {
        name: variant
        for name, variant in variants(tokenizer, options.llama_python).items()
        if (variant.runtime not in PACKAGES or find_spec(PACKAGES[variant.runtime]))
        and variant.runtime in options.runtimes
    }
    places = {name: folder / f"{number}.gguf" for number, name in enumerate(chosen)}
    for name, variant in chosen.items():
        variant.write(opened_of(model, tokenizer), places[name])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    script = Path(__file__).with_name("formats_client.py")
    for _ in range(options.rounds):
        for name, variant in chosen.items():
            python = options.llama_python if variant.runtime == "llama.cpp" else sys.executable
            arguments = [variant.runtime, places[name], options.threads, options.tokens, options.seconds]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            command = [python, script, *map(str, arguments)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    parameters = sum(map(prod, parameter_shapes(model).values()))
    lines += [
        f"{size}: {parameters:,} parameters.",
        "",
        "| written as | run by | file, MB | first token, s | memory, MB | decoding, tokens/s | slowest to fastest |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, variant in chosen.items():
        median = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        megabytes = size_of(places[name]) / 1e6
        numbers[f"{size} {name}"] = median | {"file_mb": megabytes, "runs": runs[name]}
        speeds = sorted(run["decode"] for run in runs[name])
        cells = [f"{megabytes:.0f}", f"{median['load_seconds']:.2f}", f"{median['memory_mb']:.0f}"]
        cells += [f"{median['decode']:.1f}", f"{speeds[0]:.1f} to {speeds[-1]:.1f}"]
        lines.append(f"| {name} | {variant.runtime} | {' | '.join(cells)} |")
    lines.append("")


def opened_of(model: ModelConfig, tokenizer: Path) -> Exportable:
    precision = Precision.full(BITNET, model.num_layers)
    return Exportable(RandomSource(model), model, precision, tokenizer, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["100M"])
    parser.add_argument("--runtimes", nargs="+", default=["llama.cpp", *PACKAGES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--folder", type=Path, help="for the models, while they are measured")
    parser.add_argument("--name", default="formats", help="of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[str] = []
    numbers: dict[str, Any] = {}
    began = os.getloadavg()[2]
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(options, size, Path(folder), lines, numbers)
    about = f"{options.threads} threads, {options.rounds} interleaved rounds, medians. "
    about += f"Load of the machine, by its average of 15 minutes: {began:.1f} before, {os.getloadavg()[2]:.1f} after, "
    about += f"on {os.cpu_count()} cores."
    report(options.name, about + "\n\n" + "\n".join(lines), numbers, ("torch", "transformers"))


if __name__ == "__main__":
    main()
