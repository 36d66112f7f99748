"""Post-training ternary, and ternary training from a calibrated start, from one 16-bit checkpoint.

A small model is trained on real English in 16 bits, at a learning rate that has not fallen yet. From its checkpoint a
ternary phase begins with each recipe, from the weights as they are and from calibrated ones, once for each seed; a seed
is an order of the data, and so of the sequences that are calibrated on. The loss is that of held-out text: right after
the switch, without a step, and after some. The learning rate falls linearly to the end of the longest phase.

    python benchmarks/calibration.py --data FOLDER [--trunk 2400] [--steps 600] [--seeds 3] [--sequences 64]

FOLDER holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from measure import report
from muon import MODEL
from quantizers import model_and_data, run

from launcher.checkpoint.folders import folder_of
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics

RECIPES = {
    "absmean": ["weights=absmean"],
    "gaussian": ["weights=gaussian"],
    "gaussian by row": ["weights=gaussian", "granularity=row"],
}
LOOKS = (50, 200)
"""Steps after which the loss is measured, besides the last."""


class Start(NamedTuple):
    """How a ternary phase begins."""

    method: str | None
    ramp_steps: int = 0
    optimizer: str = "keep"

    def __str__(self) -> str:
        parts = [self.method or "plain"]
        parts += [f"ramp of {self.ramp_steps}"] if self.ramp_steps else []
        parts += [f"moments {self.optimizer}"] if self.optimizer != "keep" else []
        return ", ".join(parts)


PLAIN, CALIBRATED = Start(None), Start("error-feedback")
CASES: list[tuple[str, Start, int, int | None]] = [
    *(("gaussian", start, 3, 3) for start in (PLAIN, CALIBRATED)),
    *(("gaussian", start._replace(ramp_steps=20), 2, None) for start in (PLAIN, CALIBRATED)),
    *(("gaussian", start._replace(optimizer="reset"), 1, None) for start in (PLAIN, CALIBRATED)),
    *(("absmean", start, 2, 2) for start in (PLAIN, CALIBRATED)),
    *(("gaussian by row", start, 2, 1) for start in (PLAIN, CALIBRATED)),
    *((recipe, Start("scales"), 0, 0) for recipe in RECIPES),
]
"""Recipe, start, and how often the loss is looked at on the way: with the first seed and with the others, None for not
at all. A core has an hour."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trunk", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[list[float]]] = {}
    with (
        tempfile.TemporaryDirectory() as text,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        folder = Path(text)
        in_16_bits, source = pool.apply(train_trunk, (options, folder))
        print(f"16 bits: {in_16_bits:.4f}", flush=True)
        for seed in range(options.seeds):
            for key, losses in pool.apply(losses_of_seed, (options, folder, source, seed)):
                found.setdefault(key, []).append(losses)
    report("calibration", table(options, in_16_bits, found), {" | ".join(key): found[key] for key in found})


def table(options: argparse.Namespace, in_16_bits: float, found: dict[tuple[str, str], list[list[float]]]) -> str:
    """Means, and ranges over seeds, of the losses of each recipe and start."""
    steps = ["right after the switch", *(f"{step} steps" for step in (*LOOKS, options.steps))]
    lines = [f"| recipe | start | {' | '.join(steps)} |", "| --- | --- |" + " --- |" * len(steps)]
    for (recipe, start), losses in found.items():
        cells = []
        for at in range(len(steps)):
            values = [each[at] for each in losses if at < len(each)]
            spread = f" ({min(values):.4f} to {max(values):.4f})" if len(set(values)) > 1 else ""
            count = f", of {len(values)}" if len(values) < options.seeds else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}{count}" if values else "")
        lines.append(f"| {recipe} | {start} | {' | '.join(cells)} |")
    return (
        f"A model of {MODEL['num_layers']} blocks of width {MODEL['hidden_size']}, {options.trunk} steps of 8 x 128 "
        f"tokens in 16 bits: {in_16_bits:.4f} nats per token of held-out text. Calibrated on {options.sequences} "
        f"sequences; {options.seeds} seeds, means and ranges.\n\n" + "\n".join(lines)
    )


def train_trunk(options: argparse.Namespace, folder: Path) -> tuple[float, str]:
    """The held-out loss of the 16-bit phase, and the checkpoint at its end."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = config_of(options, folder, "trunk", 0, ["evaluation={}"], 1)
    in_16_bits, _ = run(config)
    return in_16_bits, str(folder_of(RunFolder(config).checkpoints, options.trunk))


def losses_of_seed(
    options: argparse.Namespace, folder: Path, source: str, seed: int
) -> list[tuple[tuple[str, str], list[float]]]:
    """The held-out losses of each recipe and start: after the switch, and after the steps that are looked at."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = []
    for number, (recipe, start, first_looks, other_looks) in enumerate(CASES):
        if (num_looks := other_looks if seed else first_looks) is None:
            continue
        steps = (1, *LOOKS, options.steps)[num_looks]
        overrides = [f"phases.1.quantization.{key}" for key in RECIPES[recipe]]
        overrides += [
            f"checkpoint.start_from={source}",
            "checkpoint.start_phase=1",
            f"phases.1.transition.ramp.steps={start.ramp_steps}",
            f"phases.1.transition.optimizer={start.optimizer}",
        ]
        if start.method is not None:
            calibration = f"{{sequences: {options.sequences}, method: {start.method}}}"
            overrides.append(f"phases.1.transition.calibration={calibration}")
        config = config_of(options, folder, f"{number}-{seed}", seed, overrides, steps)
        run(config)
        rows = read_metrics(config.run.path / "metrics.jsonl")
        first, *losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
        looks = [losses[step // LOOKS[0] - 1] for step in (*LOOKS, options.steps) if step <= steps]
        found.append(((recipe, str(start)), [first, *looks]))
        shutil.rmtree(config.run.path)
        print(f"{recipe}, {start}, seed {seed}: {', '.join(f'{loss:.4f}' for loss in found[-1][1])}", flush=True)
    return found


def config_of(
    options: argparse.Namespace, folder: Path, name: str, seed: int, overrides: list[str], steps: int
) -> Config:
    """A run of a 16-bit phase and another one of some steps."""
    decay = options.steps / (options.trunk + options.steps)
    return load_config(
        Path("configs/english-4m.yaml"),
        [
            f"run.folder={folder / name}",
            *model_and_data(options.data, folder, seed),
            *(f"model.{key}={value}" for key, value in MODEL.items()),
            "optimizer.learning_rate=4e-3",
            f"phases.0.steps={options.trunk}",
            f"phases.1.steps={steps}",
            "phases.1.transition={ramp: {steps: 0}, data: restart}",
            f"schedule.horizon_steps={options.trunk + options.steps}",
            f"schedule.decay_fraction={decay}",
            "checkpoint.interval_steps=null",
            f"evaluation={{interval_steps: {LOOKS[0]}}}",
            "logging.tensorboard=false",
            "logging.quantization_interval_steps=null",
            "logging.interval_steps=50",
            *overrides,
        ],
    )


if __name__ == "__main__":
    main()
