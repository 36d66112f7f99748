"""Averaged weights at a constant learning rate, beside what a decay of the learning rate gives.

A small model is trained on real English in 16 bits at a constant rate, with averages of several half-lives. At each
point its state is kept, and a run from there decays linearly to a tenth of the rate, over a quarter of the steps so far
(a fifth of that run). The constant rate goes on as long too. From the last point it also goes on ternary, at full
strength from the first step, to show what averages of latent weights are worth.

    python benchmarks/averaging.py --data FOLDER [--points 600 1200] [--seeds 3] [--rate 4e-3]

FOLDER holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from measure import report
from muon import MODEL
from quantizers import model_and_data
from torch import Tensor

from launcher.commands.prepare import prepare_with_progress
from launcher.config.file import load_config
from launcher.engine.averaging import Average
from launcher.engine.build import build_engine
from launcher.engine.contract import Engine, load_weights
from launcher.plan.plan import Plan, make_plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.training.guard import SpikeGuard
from launcher.training.held_out import HeldOut
from launcher.training.step import open_data, train_step
from model.init import initial_value
from quant.config import QuantConfig
from quant.linear import quantize_

HALF_LIVES = (8, 32, 64, 128, 256)
"""In steps."""
LAST, APART = 5, 30
"""Checkpoints of a plain mean, and the steps between them."""
TERNARY_STEPS = 300
RANKS = Ranks(0, 1, 0, torch.device("cpu"))

Losses = dict[str, float]


class Averages:
    """Averages of several half-lives, and the last checkpoints, of one engine."""

    def __init__(self, engine: Engine, tokens_per_step: int) -> None:
        self._engine, self._tokens = engine, tokens_per_step
        weights = engine.weights()
        self._moving = {h: Average(weights, h * tokens_per_step, RANKS.device) for h in HALF_LIVES}
        self._last: list[dict[str, Tensor]] = []

    def add(self, step: int) -> None:
        """Take in the weights after a step."""
        weights = self._engine.weights()
        for average in self._moving.values():
            average.update_(weights, self._tokens, torch.zeros(()))
        if step % APART == 0:
            copy = {name: weight.clone() for name, weight in weights.items()}
            self._last = [*self._last, copy][-LAST:]

    def measure(self, held_out: HeldOut) -> Losses:
        """The held-out loss of the live weights and of each average."""
        losses = {"live": loss_of(held_out, self._engine)}
        averaged = {f"average, half-life of {h} steps": average.tensors for h, average in self._moving.items()}
        averaged[f"mean of {LAST} checkpoints, {APART} steps apart"] = {
            name: torch.stack([each[name] for each in self._last]).mean(0) for name in self._last[0]
        }
        live = {name: weight.clone() for name, weight in self._engine.weights().items()}
        for name, values in averaged.items():
            put(self._engine, values)
            losses[name] = loss_of(held_out, self._engine)
        put(self._engine, live)
        return losses


def loss_of(held_out: HeldOut, engine: Engine) -> float:
    """Held-out loss in nats per token."""
    found = held_out.measure(engine)
    assert found is not None
    return found.nats_per_token


def put(engine: Engine, values: dict[str, Tensor]) -> None:
    """Give the engine other weights."""
    with torch.no_grad():
        for name, weight in engine.weights().items():
            weight.copy_(values[name])
    engine.refresh_weights()


def plan_of(options: argparse.Namespace, folder: Path, seed: int, steps: int, *, decays: bool) -> Plan:
    """A run of this many steps, of which the last fifth decays, or none."""
    overrides = [
        f"run.folder={folder / 'run'}",
        f"run.seed={seed}",
        *model_and_data(options.data, folder, seed),
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"optimizer.learning_rate={options.rate}",
        f"phases=[{{precision: 16-bit, steps: {steps}}}]",
        "schedule={shape: wsd, warmup_steps: 60, decay_fraction: 0.2}"
        if decays
        else "schedule={shape: constant, warmup_steps: 60}",
    ]
    return make_plan(load_config(Path("configs/english-4m.yaml"), overrides), 1)


def losses_of(options: argparse.Namespace, folder: Path, seed: int) -> dict[int, Losses]:
    """By step, the losses at a constant rate, after a decay, and in a ternary phase."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    last = options.points[-1] + options.points[-1] // 4
    constant = plan_of(options, folder, seed, last + TERNARY_STEPS, decays=False)
    config = constant.config
    assert config.data.prepare is not None
    shards = Path(config.data.sources[0].path)
    prepare_with_progress(config.data.prepare, config.data.sequence_length, shards, Console(silent=True))
    engine = build_engine(constant, None, RANKS)
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, seed, rows))
    averages = Averages(engine, constant.tokens_at(0))
    data = open_data(constant, RANKS, 0)
    held_out = HeldOut(constant, RANKS, data)
    data.close()

    def train(plan: Plan, steps: Iterable[int], averages: Averages | None = None) -> None:
        steps = list(steps)
        data = open_data(plan, RANKS, steps[0])
        batches = iter(data)
        guard = SpikeGuard(None, smooths=False, ranks=RANKS)
        for step in steps:
            train_step(engine, batches, plan, step, guard)
            if averages is not None:
                averages.add(step + 1)
        data.close()

    losses: dict[int, Losses] = {}
    step = 0
    for point in options.points:
        end = point + point // 4
        train(constant, range(step, point), averages)
        losses[point] = averages.measure(held_out)
        before = {
            (shard.name, kind): tensor.clone()
            for shard in engine.shards()
            for kind, tensor in {**shard.tensors, "step": shard.step}.items()
        }
        train(plan_of(options, folder, seed, end, decays=True), range(point, end))
        decayed = loss_of(held_out, engine)
        restore(engine, before)
        train(constant, range(point, end), averages)
        losses[end] = averages.measure(held_out) | {"decayed": decayed}
        step = end
    quantize_(engine.model, QuantConfig(), RANKS.device)
    engine.refresh_weights()
    train(constant, range(last, last + TERNARY_STEPS), averages)
    losses[last + TERNARY_STEPS] = averages.measure(held_out)
    return losses


@torch.no_grad()
def restore(engine: Engine, state: dict[tuple[str, str], Tensor]) -> None:
    """Put weights, moments and steps back."""
    for shard in engine.shards():
        for kind, tensor in {**shard.tensors, "step": shard.step}.items():
            tensor.copy_(state[shard.name, kind])
    engine.refresh_weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--points", type=int, nargs="+", default=[600, 1200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4e-3)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        # A process for each seed: `streaming` keeps the shared memory of every data set open.
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        tasks = [(options, Path(folder), seed) for seed in range(options.seeds)]
        found = pool.starmap(losses_of, tasks, chunksize=1)
    steps = list(found[0])
    names = list(dict.fromkeys(name for losses in found for step in steps for name in losses[step]))
    heads = [f"step {step}" for step in steps[:-1]] + [f"after {TERNARY_STEPS} ternary steps"]
    lines = [f"| weights | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for name in names:
        cells = []
        for step in steps:
            values = [losses[step][name] for losses in found if name in losses[step]]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = (
        f"A model of {MODEL['num_layers']} blocks of width {MODEL['hidden_size']} in 16 bits, steps of 8 x 128 tokens "
        f"at a rate of {options.rate:g}; held-out loss in nats per token, mean and range of {options.seeds} seeds. "
        "`decayed` has as many steps as its column, the last fifth of them on the way to a tenth of the rate.\n\n"
        + "\n".join(lines)
    )
    report("averaging", text, {str(seed): losses for seed, losses in enumerate(found)})


if __name__ == "__main__":
    main()
