"""AdamW and Muon side by side: held-out loss at the end of a 16-bit phase, and of the ternary phase that follows.

A small model is trained on real English from the beginning, once for each optimizer, learning rate and seed; a seed is
one of first weights and of the order of the data. The switch is abrupt, in the middle of the run, and the learning rate
falls linearly in the last fifth. By default there are about 12 tokens for each ternary weight.

    python benchmarks/muon.py --data FOLDER [--steps 2400] [--seeds 3] [--rates 2e-3 4e-3 8e-3]

FOLDER holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch.distributed as dist
from measure import report
from quantizers import model_and_data, run

from launcher.config.file import load_config
from launcher.config.sections import Config

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "intermediate_size": 172}
OPTIMIZERS = {
    "AdamW": [],
    "Muon": ["optimizer.name=muon"],
    "AdamW, then Muon": ["phases.1.transition.optimizer_name=muon"],
    "Muon, then AdamW": [
        "optimizer.name=muon",
        "phases.1.transition.optimizer_name=adamw",
        "phases.1.transition.optimizer=reset",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["AdamW", "Muon"])
    options = parser.parse_args()
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        for seed in range(options.seeds):
            for rate in options.rates:
                for name in options.optimizers:
                    losses = pool.apply(losses_of, (options, Path(folder), name, rate, seed))
                    found.setdefault((name, rate), []).append(losses)
                    print(f"{name}, {rate:g}, seed {seed}: {losses[0]:.4f}, {losses[1]:.4f}", flush=True)
    lines = ["| optimizer | learning rate | end of 16 bits: mean | range | end of ternary: mean | range |"]
    lines.append("| --- | ---: | ---: | --- | ---: | --- |")
    for (name, rate), pairs in sorted(found.items()):
        cells = [f"{name} | {rate:g}"]
        for values in zip(*pairs, strict=True):
            cells.append(f"{statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"A model of {MODEL['num_layers']} blocks of width {MODEL['hidden_size']}, {options.steps} steps of 8 x 128 "
        f"tokens, the second half ternary; {options.seeds} seeds. Held-out loss in nats per token.\n\n"
        + "\n".join(lines)
    )
    report("muon", text, {f"{name}, {rate:g}": pairs for (name, rate), pairs in found.items()})


def losses_of(options: argparse.Namespace, folder: Path, name: str, rate: float, seed: int) -> tuple[float, float]:
    """The held-out losses at the ends of both phases."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    in_16_bits, ternary = run(config_of(options, folder, name, rate, seed))
    return in_16_bits, ternary


def config_of(options: argparse.Namespace, folder: Path, name: str, rate: float, seed: int) -> Config:
    """The run of one optimizer, learning rate and seed."""
    overrides = [
        f"run.folder={folder / f'{name}-{rate}-{seed}'.replace(' ', '-').replace(',', '')}",
        f"run.seed={seed}",
        *model_and_data(options.data, folder, seed),
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"optimizer.learning_rate={rate}",
        f"phases.0.steps={options.steps // 2}",
        f"phases.1.steps={options.steps - options.steps // 2}",
        "phases.1.transition={ramp: {steps: 0}}",
        "schedule.decay_fraction=0.2",
        "checkpoint.interval_steps=null",
        "evaluation={}",
        "logging.tensorboard=false",
        "logging.interval_steps=50",
        *OPTIMIZERS[name],
    ]
    return load_config(Path("configs/english-4m.yaml"), overrides)


if __name__ == "__main__":
    main()
