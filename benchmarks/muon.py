"""AdamW and Muon side by side: held-out loss at the end of a 16-bit phase, and of the ternary phase that follows.

A small model is trained on real English from the beginning, once for each optimizer, learning rate and seed; a seed is
one of first weights and of the order of the data. The switch is abrupt, in the middle of the run, and the learning rate
falls linearly in the last fifth. By default there are about 12 tokens for each ternary weight.

    python benchmarks/muon.py --data FOLDER [--seeds 0 1 2] [--rates 2e-3 4e-3] [--optimizers AdamW Muon]

What has run is in results/muon.jsonl: the same command goes on where it stopped, and another one adds its arms. FOLDER
holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from measure import RESULTS, report
from quantizers import model_and_data, run

from launcher.config.file import load_config
from launcher.config.sections import Config

ARMS = RESULTS / "muon.jsonl"
STEPS = 2400
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["AdamW", "Muon"])
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        for seed in options.seeds:
            for rate in options.rates:
                for name in options.optimizers:
                    if (name, rate, seed) not in {(arm["optimizer"], arm["rate"], arm["seed"]) for arm in read_arms()}:
                        losses = pool.apply(losses_of, (options.data, Path(folder), name, rate, seed))
                        keep({"optimizer": name, "rate": rate, "seed": seed, "16-bit": losses[0], "ternary": losses[1]})
    table()


def read_arms() -> list[dict[str, Any]]:
    """What has run."""
    return [json.loads(line) for line in ARMS.read_text().splitlines()] if ARMS.exists() else []


def keep(arm: dict[str, Any]) -> None:
    print(json.dumps(arm), flush=True)
    with ARMS.open("a") as file:
        file.write(json.dumps(arm) + "\n")


def table() -> None:
    """Write the means over seeds, and how they differ from AdamW's of the same rate and seeds."""
    arms: dict[tuple[str, float], dict[int, dict[str, float]]] = defaultdict(dict)
    for arm in read_arms():
        arms[arm["optimizer"], arm["rate"]][arm["seed"]] = arm
    lines = ["| optimizer | learning rate | seeds | end of 16 bits | less AdamW's | end of ternary | less AdamW's |"]
    lines.append("| --- | ---: | ---: | ---: | --- | ---: | --- |")
    for (name, rate), by_seed in sorted(
        arms.items(), key=lambda item: (item[0][1], list(OPTIMIZERS).index(item[0][0]))
    ):
        cells = [f"{name} | {rate:g} | {len(by_seed)}"]
        for phase in ("16-bit", "ternary"):
            adamw = arms["AdamW", rate]
            gains = sorted(arm[phase] - adamw[seed][phase] for seed, arm in by_seed.items() if seed in adamw)
            cells.append(f"{statistics.mean(arm[phase] for arm in by_seed.values()):.4f}")
            cells.append("" if name == "AdamW" or not gains else f"{gains[0]:+.4f} to {gains[-1]:+.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"A model of {MODEL['num_layers']} blocks of width {MODEL['hidden_size']}, {STEPS} steps of 8 x 128 tokens, "
        "the second half ternary. Held-out loss in nats per token, the mean over seeds; differences are of the same "
        "seed, from the least to the greatest.\n\n" + "\n".join(lines)
    )
    report("muon", text, {"arms": read_arms()})


def losses_of(data: Path, folder: Path, name: str, rate: float, seed: int) -> tuple[float, float]:
    """The held-out losses at the ends of both phases."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    in_16_bits, ternary = run(config_of(data, folder, name, rate, seed))
    return in_16_bits, ternary


def config_of(data: Path, folder: Path, name: str, rate: float, seed: int) -> Config:
    """The run of one optimizer, learning rate and seed."""
    overrides = [
        f"run.folder={folder / f'{name}-{rate}-{seed}'.replace(' ', '-').replace(',', '')}",
        f"run.seed={seed}",
        *model_and_data(data, folder, seed),
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"optimizer.learning_rate={rate}",
        f"phases.0.steps={STEPS // 2}",
        f"phases.1.steps={STEPS - STEPS // 2}",
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
