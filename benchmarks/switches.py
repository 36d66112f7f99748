"""Switches side by side: the loss above that of 16 bits on the way, and the held-out loss after the same steps.

A small model is trained on real English in 16 bits. From its checkpoint each switch to ternary trains the same number
of steps with the same learning rates, once for each seed; a seed is an order of the data, the same for all switches.
The losses of training are compared step by step with those of the model that goes on in 16 bits on the same data.

    python benchmarks/switches.py --data FOLDER [--trunk 2400] [--steps 300] [--seeds 3] [--source CHECKPOINT]

FOLDER holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line. CHECKPOINT is that before the switch,
from an earlier run; it is trained first if it is not named.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch.distributed as dist
from measure import report
from muon import MODEL
from quantizers import model_and_data, run

from launcher.checkpoint.folders import folder_of
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics

BASELINE = "16 bits, continued"
SWITCHES: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "abrupt": {"steps": 0},
    "linear 20": {"steps": 20},
    "linear 60": {"steps": 60},
    "linear 200": {"steps": 200},
    "cosine 60": {"steps": 60, "shape": "cosine"},
    "exponential 60": {"steps": 60, "shape": "exponential"},
    "front to back 200": {"steps": 200, "order": "front-to-back"},
    "back to front 200": {"steps": 200, "order": "back-to-front"},
    "sensitivity 200": {"steps": 200, "order": "sensitivity"},
    "softmax 60": {"steps": 60, "rounding": "softmax"},
    "softmax 200": {"steps": 200, "rounding": "softmax"},
}

DRAWN = ("abrupt", "linear 60", "linear 200", "sensitivity 200", "softmax 60", "softmax 200")
SMOOTHED_STEPS = 8


@dataclass(frozen=True)
class Found:
    """One switch with one seed."""

    losses: list[float]
    """Of training, by step."""
    before: float
    """Held-out loss after the switch and before the first step, at full strength; nats per token."""
    held_out: float
    """At the end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trunk", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--switches", nargs="+", choices=[*SWITCHES][1:], default=[*SWITCHES][1:])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        source = str(options.source or trained_trunk(options, folder))
        # A process for each seed: `streaming` keeps the shared memory of every data set open.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            tasks = [(options, folder, source, seed) for seed in range(options.seeds)]
            by_seed = pool.starmap(of_seed, tasks, chunksize=1)
    found = {name: [seed[name] for seed in by_seed if name in seed] for name in [BASELINE, *options.switches]}
    write(found, options)


def write(found: dict[str, list[Found]], options: argparse.Namespace) -> None:
    """The table and the plot."""
    before = found[BASELINE][0].before
    numbers = {name: measures(runs, found[BASELINE]) for name, runs in found.items()}
    lines = [
        "| switch | seeds | area, nats x steps | range | peak, nats | range | held-out loss above 16 bits | range |"
    ]
    lines.append("| --- | ---: | ---: | --- | ---: | --- | ---: | --- |")
    for name, columns in sorted(numbers.items(), key=lambda item: statistics.mean(item[1]["held_out_above"])):
        cells = [name, str(len(found[name]))]
        for key, digits in (("area", 1), ("peak", 3), ("held_out_above", 4)):
            values = columns[key]
            cells += [f"{statistics.mean(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"A model of {MODEL['num_layers']} blocks of width {MODEL['hidden_size']}, {options.trunk} steps of 8 x 128 "
        f"tokens in 16 bits (held-out loss {before:.4f} nats per token), then {options.steps} steps with each switch. "
        "The number in a name is the ramp's steps. Area and peak are of the training loss above that of 16 bits on the "
        f"same batches; the peak is of means over {SMOOTHED_STEPS} steps. All is compared with the 16-bit model of the "
        "same seed, and given as a mean over seeds and its range; losses are in nats per token.\n\n" + "\n".join(lines)
    )
    report("switches", text, numbers)
    draw(found, Path("docs/images/switches.png"))


def trained_trunk(options: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint at the end of the 16-bit phase."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trunk = config_of(options, folder, "trunk", None, 0)
    run(trunk)
    dist.destroy_process_group()
    return Path(str(folder_of(RunFolder(trunk).checkpoints, options.trunk)))


def of_seed(options: argparse.Namespace, folder: Path, source: str, seed: int) -> dict[str, Found]:
    """All switches with one order of the data."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Found] = {}
    for number, name in enumerate([BASELINE, *options.switches]):
        config = config_of(options, folder, f"{number}-{seed}", SWITCHES[name], seed, source)
        held_out = run(config)[-1]
        rows = read_metrics(config.run.path / "metrics.jsonl")
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        [before] = [row["validation/loss"] for row in rows if row.get("validation/when") == "start of phase"]
        found[name] = Found(losses, before, held_out)
        shutil.rmtree(config.run.path)
        print(f"{name}, seed {seed}: {measures([found[name]], [found[BASELINE]])}", flush=True)
    return found


def config_of(
    options: argparse.Namespace, folder: Path, name: str, ramp: dict[str, Any] | None, seed: int, source: str = ""
) -> Config:
    """The run of one switch and seed; without a source, from the beginning."""
    overrides = [
        f"run.folder={folder / name}",
        *model_and_data(options.data, folder, seed),
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        "data.validation_rows=128",
        "optimizer.learning_rate=4e-3",
        f"phases.0.steps={options.trunk}",
        f"phases.1.steps={options.steps if source else 1}",
        f"phases.1.precision={'16-bit' if ramp is None else 'ternary'}",
        "phases.1.transition={data: restart, ramp: {steps: 0}}",
        f"schedule.horizon_steps={options.trunk + options.steps}",
        f"schedule.decay_fraction={options.steps / (options.trunk + options.steps)}",
        "checkpoint.interval_steps=null",
        "evaluation={}",
        "logging.tensorboard=false",
        "logging.interval_steps=1",
        *(f"phases.1.transition.ramp.{key}={value}" for key, value in (ramp or {}).items()),
    ]
    if source:
        overrides += [f"checkpoint.start_from={source}", "checkpoint.start_phase=1"]
    return load_config(Path("configs/english-4m.yaml"), overrides)


def measures(runs: list[Found], baseline: list[Found]) -> dict[str, list[float]]:
    """Area, peak and held-out loss above 16 bits, and the held-out loss itself, for each seed."""
    above = [
        [loss - other for loss, other in zip(run.losses, same.losses, strict=True)]
        for run, same in zip(runs, baseline, strict=False)
    ]
    return {
        "area": [sum(values) for values in above],
        "peak": [max(smoothed(values)) for values in above],
        "held_out_above": [run.held_out - same.held_out for run, same in zip(runs, baseline, strict=False)],
        "held_out": [run.held_out for run in runs],
    }


def smoothed(values: list[float]) -> list[float]:
    """Means over `SMOOTHED_STEPS`."""
    sums = [0.0, *accumulate(values)]
    return [(end - begin) / SMOOTHED_STEPS for begin, end in zip(sums, sums[SMOOTHED_STEPS:], strict=False)]


def draw(found: dict[str, list[Found]], path: Path) -> None:
    """The loss above 16 bits, mean over seeds, and the held-out loss with a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name in [name for name in DRAWN if name in found]:
        pairs = zip(found[name], found[BASELINE], strict=False)
        above = [smoothed([a - b for a, b in zip(run.losses, same.losses, strict=True)]) for run, same in pairs]
        left.plot([statistics.mean(values) for values in zip(*above, strict=True)], label=name, linewidth=1.4)
    left.set_xlabel(f"steps after the switch (means over {SMOOTHED_STEPS} steps)")
    left.set_ylabel("training loss above 16 bits, nats per token")
    left.legend(frameon=False)
    numbers = {name: measures(runs, found[BASELINE])["held_out_above"] for name, runs in found.items()}
    order = sorted((name for name in found if name != BASELINE), key=lambda name: -statistics.mean(numbers[name]))
    for height, name in enumerate(order):
        right.plot(numbers[name], [height] * len(numbers[name]), "o", color="#0072b2", alpha=0.55, markersize=5)
        right.plot([statistics.mean(numbers[name])], [height], "|", color="#0072b2", markersize=16, markeredgewidth=2)
    right.set_yticks(range(len(order)), order)
    right.set_xlabel("held-out loss at the end above 16 bits (a dot for each seed)")
    right.grid(axis="x", color="#d1d9e0", linewidth=0.6)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
