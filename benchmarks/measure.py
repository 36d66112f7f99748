"""What the benchmarks here share: options, interleaved timing, medians, and a file that says what ran where."""

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quant.integers import CPU_HAS_INT8, CPU_HAS_PAIRS

RESULTS = Path(__file__).parent / "results"


def parser_of(description: str | None, config: str) -> argparse.ArgumentParser:
    """A parser of --config, with this default, and of overrides; use its `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(config))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def seconds_of(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Wall-clock seconds of one call, up to the end of the device's work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def processor_seconds_of(run: Callable[[], object]) -> float:
    """Seconds of this process's threads in one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(
    variants: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device | None = None,
    *,
    of_process: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every variant, taken in turns, so that a slow moment of the machine falls on all of them.

    With ``of_process`` they are seconds of this process's threads, which other programs on the machine do not lengthen.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(processor_seconds_of(run) if of_process else seconds_of(run, device))
    return seconds


def table(seconds: dict[str, list[float]], baseline: str) -> str:
    """Median, range and ratio to the baseline, as Markdown."""
    base = statistics.median(seconds[baseline])
    lines = ["| | median ms | fastest to slowest | x baseline |", "| --- | --- | --- | --- |"]
    for name, values in seconds.items():
        median, fastest, slowest = (1e3 * value for value in (statistics.median(values), min(values), max(values)))
        lines.append(f"| {name} | {median:.1f} | {fastest:.1f} to {slowest:.1f} | {median / base / 1e3:.2f} |")
    return "\n".join(lines)


def instructions() -> str:
    """The CPU's for 8-bit products."""
    return "VNNI" if CPU_HAS_INT8 else "AVX2" if CPU_HAS_PAIRS else "none"


def hardware() -> str:
    """The GPU, or the CPU with its instructions for 8-bit products and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, 8-bit products by {instructions()}, {torch.get_num_threads()} threads"


def report(name: str, text: str, numbers: dict[str, Any], packages: tuple[str, ...] = ("torch",)) -> None:
    """Print a benchmark's result and write it to `results/NAME.md`, with date, hardware, versions and command."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    head = (
        f"# {name}\n\n"
        f"- date: {datetime.now(UTC):%Y-%m-%d}\n"
        f"- hardware: {hardware()}\n"
        f"- versions: python {platform.python_version()}, "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + f", commit {commit.stdout.strip() or 'unknown'}\n"
        f"- command: `{shlex.join(['python', *sys.argv])}`\n"
    )
    document = f"{head}\n{text}\n\n```json\n{json.dumps(numbers)}\n```\n"
    print(document)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(document)
