"""From the command to the first step, and how much of a step is waiting for data.

Runs `tritrain train` for a few steps on prepared shards, with the loader in the training process and apart, and reads
what the run itself writes down. The first step is counted from the start of the command: imports, data, model, an
evaluation of the untrained model, and the step.

    python benchmarks/start.py [--config configs/quickstart.yaml] [--ranks 2] [--repeats 3]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import report

from launcher.config.file import load_config
from launcher.run.metrics_log import read_metrics

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds: list[float] = []
    wait_shares: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats + 1):
            for workers, shares in wait_shares.items():
                first_step, wait_share = run(options.config, options.ranks, workers, Path(folder), repeat)
                if repeat:  # the first prepares the data and fills the caches
                    seconds.append(first_step)
                    shares.append(wait_share)
    numbers = {
        "seconds_to_first_step": round(statistics.median(seconds), 2),
        "data_wait_share": {
            f"{workers} workers": round(statistics.median(shares), 5) for workers, shares in wait_shares.items()
        },
    }
    text = (
        f"`tritrain train {options.config} --ranks {options.ranks}` on prepared shards, {options.repeats} rounds.\n\n"
        "| | median | fastest to slowest |\n| --- | --- | --- |\n"
        f"| seconds from the command to the end of the first step | {numbers['seconds_to_first_step']:.1f} "
        f"| {min(seconds):.1f} to {max(seconds):.1f} |\n"
        + "\n".join(
            f"| share of a step spent waiting for data, {workers} worker{'s' * (workers != 1)} "
            f"| {statistics.median(shares):.2%} | {min(shares):.2%} to {max(shares):.2%} |"
            for workers, shares in wait_shares.items()
        )
    )
    report("start", text, numbers, ("torch", "mosaicml-streaming"))


def run(config: Path, ranks: int, workers: int, folder: Path, repeat: int) -> tuple[float, float]:
    """Train a few steps; returns the seconds to the first, and the median share of the later ones waited for data."""
    name = f"{repeat}-{workers}"
    phases = len(load_config(config).phases)
    command = [str(Path(sys.executable).with_name("tritrain")), "train", str(config), "--ranks", str(ranks)]
    command += [f"run.folder={folder / name}", f"data.sources.0.path={folder / 'shards'}", f"data.workers={workers}"]
    command += [f"phases.0.steps={STEPS}", *(f"phases.{index}.steps=1" for index in range(1, phases))]
    command += [f"phases.{index}.transition.ramp.steps=0" for index in range(1, phases)]
    command += ["schedule.warmup_steps=2", "logging.interval_steps=1", "evaluation.sample_prompts=[]"]
    started, first_step = time.perf_counter(), None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if first_step is None and "step 1/" in line:
            first_step = time.perf_counter() - started
    if process.wait() or first_step is None:
        sys.exit(f"{' '.join(command)} failed")
    shares = [row["data/wait_share"] for row in read_metrics(folder / name / "metrics.jsonl") if "train/loss" in row]
    return first_step, statistics.median(shares[1:STEPS])


if __name__ == "__main__":
    main()
