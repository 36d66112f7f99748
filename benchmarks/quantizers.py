"""Quantizers side by side: error on real weights, and the loss after the same ternary phase from one checkpoint.

A small model is trained on real English in 16 bits. From its checkpoint each recipe trains the same number of steps, at
full strength from the first, with the same learning rates, once for each seed; a seed is an order of the data. The loss
is that of held-out text at the end.

    python benchmarks/quantizers.py --data FOLDER [--compare quantizers|backward] [--steps 150] [--seeds 3]

`backward` compares the backward passes of one recipe. FOLDER holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a
"text" in every line.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import report

from launcher.checkpoint.folders import folder_of
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.formats.open import open_source
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.train import train
from launcher.watch.stopping import StopRequest
from quant.config import PRESETS, QuantConfig
from quant.hadamard import rotate
from quant.rounding import Scale, dequantize, first_alpha, learned_scale, quantize_weight, weight_codes

BASELINE = "16 bits, continued"
RECIPES: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "absmean (bitnet-b1.58)": {"weights": "absmean"},
    "absmean by row": {"weights": "absmean", "granularity": "row"},
    "absmean by group of 32": {"weights": "absmean", "granularity": "group", "group_size": 32},
    "absmean, clipped gradient": {"weights": "absmean", "gradient": "clipped"},
    "absmean, dead-zone bias": {"weights": "absmean", "dead_zone_bias": 1e-3},
    "absmedian": {"weights": "absmedian"},
    "nielsen-2025": {"preset": "nielsen-2025"},
    "TWN": {"weights": "twn"},
    "gaussian": {"weights": "gaussian"},
    "gaussian by row": {"weights": "gaussian", "granularity": "row"},
    "gaussian, trust gradient": {"weights": "gaussian", "gradient": "trust"},
    "quest": {"preset": "quest"},
    "bitnet-v2": {"preset": "bitnet-v2"},
    "paretoq": {"preset": "paretoq"},
    "binary, gaussian": {"levels": "binary", "weights": "gaussian"},
    "2 bits, gaussian": {"levels": "int2", "weights": "gaussian"},
    "4 bits, gaussian": {"levels": "int4", "weights": "gaussian"},
}
COMPARED: dict[str, dict[str, dict[str, Any] | None]] = {
    "quantizers": RECIPES,
    "backward": {
        BASELINE: None,
        "exact": {},
        "int8-input": {"backward": "int8-input"},
        "int8": {"backward": "int8"},
    },
}
MODEL = {"vocab_size": 1024, "hidden_size": 128, "num_layers": 3, "num_heads": 4, "intermediate_size": 384}
TRUNK_STEPS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--compare", choices=COMPARED, default="quantizers")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        trunk = config_of(options, folder, "trunk", None, 0)
        held_out, continued = run(trunk)
        dist.destroy_process_group()
        source = str(folder_of(RunFolder(trunk).checkpoints, TRUNK_STEPS))
        recipes = COMPARED[options.compare]
        losses: dict[str, list[float]] = {name: [] for name in recipes}
        # A process for each seed: `streaming` keeps the shared memory of every data set open.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            tasks = [(options, folder, source, seed) for seed in range(options.seeds)]
            for found in pool.starmap(losses_of_seed, tasks, chunksize=1):
                for name, loss in found.items():
                    losses[name].append(loss)
        losses[BASELINE].insert(0, continued)
        errors = {name: on_weights(source, keys) for name, keys in recipes.items() if keys is not None}
    numbers = {
        name: {
            "loss": round(statistics.mean(values), 4),
            "spread": round(max(values) - min(values), 4),
            **(
                {"relative_error": round(errors[name][0], 3), "zeros": round(errors[name][1], 3)}
                if name in errors
                else {}
            ),
        }
        for name, values in losses.items()
    }
    rows = [
        f"| {name} | {values.get('relative_error', '')} | {values.get('zeros', '')} | {values['loss']} "
        f"| {min(losses[name]):.4f} to {max(losses[name]):.4f} |"
        for name, values in sorted(numbers.items(), key=lambda item: item[1]["loss"])
    ]
    model = trunk.model
    text = (
        f"A model of {model.num_layers} blocks of width {model.hidden_size}, {TRUNK_STEPS} steps of "
        f"{trunk.training.global_batch_sequences} x {trunk.data.sequence_length} tokens in 16 bits "
        f"(held-out loss {held_out:.4f} nats per token), then {options.steps} steps with each recipe, "
        f"{options.seeds} seeds.\n\n"
        "| recipe | squared error at the switch, relative | zeros at the switch | held-out loss, mean | range |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(rows)
    )
    report(options.compare, text, numbers)
    draw(losses, Path(f"docs/images/{options.compare}.png"))


def losses_of_seed(options: argparse.Namespace, folder: Path, source: str, seed: int) -> dict[str, float]:
    """The loss of each recipe; the trunk itself goes on in 16 bits with seed 0."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    losses = {}
    for number, (name, quantization) in enumerate(COMPARED[options.compare].items()):
        if name != BASELINE or seed:
            config = config_of(options, folder, f"{number}-{seed}", quantization, seed, source)
            losses[name] = run(config)[-1]
            shutil.rmtree(config.run.path)
            print(f"{name}, seed {seed}: {losses[name]:.4f} nats per token", flush=True)
    return losses


def model_and_data(data: Path, folder: Path, seed: int) -> list[str]:
    """Overrides for the small model, and for real English, prepared in a folder and read in the order of a seed."""
    return [
        f"data.sources.0.path={folder / 'shards'}",
        f"data.prepare.inputs=[{data / 'train-00-of-08.jsonl.zst'}]",
        f"data.prepare.validation_inputs=[{data / 'val.jsonl.zst'}]",
        "data.workers=0",
        "data.validation_rows=64",
        "data.prepare.tokenizer=bpe:1024",
        "data.sequence_length=128",
        "training.global_batch_sequences=8",
        f"data.shuffle_seed={seed}",
        *(f"model.{key}={value}" for key, value in MODEL.items()),
    ]


def config_of(
    options: argparse.Namespace,
    folder: Path,
    name: str,
    quantization: dict[str, Any] | None,
    seed: int,
    source: str = "",
) -> Config:
    """The run of one recipe and seed; without a source, from the beginning."""
    overrides = [
        f"run.folder={folder / name}",
        *model_and_data(options.data, folder, seed),
        f"phases.0.steps={TRUNK_STEPS}",
        f"phases.1.steps={options.steps}",
        f"phases.1.precision={'16-bit' if quantization is None else 'ternary'}",
        "phases.1.transition.ramp.steps=0",
        "phases.1.transition.data=restart",
        f"schedule.decay_fraction={options.steps / (TRUNK_STEPS + options.steps)}",
        "checkpoint.interval_steps=null",
        "evaluation={}",
        "logging.tensorboard=false",
        "logging.interval_steps=50",
    ]
    overrides += [f"phases.1.quantization.{key}={value}" for key, value in (quantization or {}).items()]
    if source:
        overrides += [f"checkpoint.start_from={source}", "checkpoint.start_phase=1"]
    return load_config(Path("configs/english-4m.yaml"), overrides)


def run(config: Config) -> list[float]:
    """Train; the held-out losses at the ends of its phases, in nats per token."""
    folder = RunFolder(config)
    plan = make_plan(config, 1)
    folder.prepare([phase.end - phase.start for phase in plan.phases])
    if config.data.prepare is not None:
        from launcher.commands.prepare import prepare_with_progress

        prepare_with_progress(
            config.data.prepare, config.data.sequence_length, Path(config.data.sources[0].path), Console(silent=True)
        )
    train(plan, Ranks(0, 1, 0, torch.device("cpu")), folder, StopRequest(), Console(silent=True))
    rows = read_metrics(config.run.path / "metrics.jsonl")
    return [row["validation/loss"] for row in rows if row.get("validation/when") == "end of phase"]


def on_weights(source: str, keys: dict[str, Any]) -> tuple[float, float]:
    """Relative squared error of rounding the trunk's projections, and the share of zeros."""
    config = QuantConfig(**(vars(PRESETS[keys["preset"]]) if "preset" in keys else {}) | keys)
    checkpoint = open_source(source)
    error = power = zeros = count = 0.0
    for name, shape in checkpoint.shapes.items():
        if not name.endswith("_proj.weight"):
            continue
        weight = checkpoint.read("weight", name, 0, math.prod(shape)).view(shape)
        if config.hadamard == "all" or (config.hadamard == "outputs" and ("o_proj" in name or "down_proj" in name)):
            weight = rotate(weight)
        if config.learned:
            scale: Scale = learned_scale(first_alpha(weight.abs().amax(1), config.levels), config.levels)
            codes, level = weight_codes(weight, scale, config), scale.level
        else:
            codes, level = quantize_weight(weight, config)
        error += float((dequantize(codes, level) - weight).square().sum())
        power += float(weight.square().sum())
        zeros += float((codes == 0).sum())
        count += weight.numel()
    return error / power, zeros / count


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """A dot for each seed and a line for the mean, the best recipe on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = sorted(losses, key=lambda name: -statistics.mean(losses[name]))
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.22 * len(order)), layout="constrained")
    for height, name in enumerate(order):
        color = "#57606a" if name == BASELINE or "bits" in name or "binary" in name else "#0072b2"
        axes.plot(losses[name], [height] * len(losses[name]), "o", color=color, alpha=0.55, markersize=5)
        axes.plot([statistics.mean(losses[name])], [height], "|", color=color, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("held-out loss, nats per token (a dot for each seed, a bar for the mean)")
    axes.grid(axis="x", color="#d1d9e0", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
