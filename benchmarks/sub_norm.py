"""Where SubLN's weights should start: runs through the switch that differ in nothing else, over sizes and seeds.

Every arm is the quickstart at another width and depth: the same text, the same order, the same schedule. `none` is the
model without SubLN. An arm that has run is in `results/sub-norm.jsonl` and is not run again, so a sweep can be
stopped, extended, and split over processes by its shapes.

    python benchmarks/sub_norm.py --shapes 64x4 64x8 --starts none 1 0.1 0.03 --seeds 1 2 3 [key.sub=value ...]
    python benchmarks/sub_norm.py --table
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from measure import RESULTS, report

from launcher.config.file import load_config
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import process_group, seed_everything
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.train import train
from launcher.watch.stopping import StopRequest

ARMS = RESULTS / "sub-norm.jsonl"


def train_arm(shape: str, start: str, seed: int, overrides: list[str]) -> dict[str, object]:
    """Bits per byte at the end of each phase."""
    width, depth = map(int, shape.split("x"))
    model = [
        f"model.hidden_size={width}",
        f"model.num_layers={depth}",
        f"model.num_heads={max(1, width // 64)}",
        f"model.intermediate_size={2 * width}",
        f"model.sub_norm={'false' if start == 'none' else 'true'}",
        *([] if start == "none" else [f"model.sub_norm_init={start}"]),
    ]
    with tempfile.TemporaryDirectory() as place, process_group(600) as ranks:
        here = [f"run.folder={place}/run", f"run.seed={seed}", "checkpoint.interval_steps=null"]
        config = load_config(Path("configs/quickstart.yaml"), [*model, *here, *overrides])
        folder, plan = RunFolder(config), make_plan(config, ranks.world_size)
        folder.prepare([phase.end - phase.start for phase in plan.phases])
        seed_everything(seed, 0)
        train(plan, ranks, folder, StopRequest(), Console(silent=True))
        rows = read_metrics(folder.path / "metrics.jsonl")
    ends = [row["validation/bits_per_byte"] for row in rows if row.get("validation/when") == "end of phase"]
    arm = {"shape": shape, "start": start, "seed": seed, "overrides": overrides}
    return arm | {"16-bit": ends[0], "ternary": ends[1]}


def read_arms() -> list[dict[str, object]]:
    """The arms that have run."""
    return [json.loads(line) for line in ARMS.read_text().splitlines()] if ARMS.exists() else []


def table() -> None:
    """Write the means over seeds, and how they differ from the model without SubLN."""
    arms = defaultdict(dict)
    for arm in read_arms():
        arms[arm["shape"], arm["start"]][arm["seed"]] = arm
    shapes = sorted({shape for shape, _ in arms}, key=lambda shape: tuple(map(int, shape.split("x"))))
    starts = sorted({start for _, start in arms}, key=lambda start: -2.0 if start == "none" else -float(start))
    seeds = sorted({arm["seed"] for arm in read_arms()})
    changed = " ".join(sorted({override for arm in read_arms() for override in arm["overrides"]}))
    text = (
        f"Held-out bits per byte of the quickstart with {changed or 'nothing else changed'}, the mean over seeds "
        f"{', '.join(map(str, seeds))}; in brackets the difference to `none`, of the same seed.\n"
    )
    for phase in ("16-bit", "ternary"):
        text += f"\nEnd of the {phase} phase:\n\n| width x blocks | {' | '.join(starts)} |\n"
        text += "| --- |" + " --- |" * len(starts) + "\n"
        for shape in shapes:
            cells = []
            for start in starts:
                there, none = arms[shape, start], arms[shape, "none"]
                if not there:
                    cells.append("")
                    continue
                mean = statistics.mean(arm[phase] for arm in there.values())
                gains = [arm[phase] - none[seed][phase] for seed, arm in there.items() if seed in none]
                spread = " to ".join(f"{gain:+.3f}" for gain in sorted({min(gains), max(gains)})) if gains else ""
                cells.append(f"{mean:.3f}" if start == "none" else f"{mean:.3f} ({spread})")
            text += f"| {shape} | {' | '.join(cells)} |\n"
    report("sub-norm", text, {"arms": read_arms()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["256x2"], metavar="WIDTHxBLOCKS")
    parser.add_argument("--starts", nargs="+", default=["none", "1", "0.1", "0.03"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="write results/sub-norm.md of the arms that have run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    if options.table:
        return table()
    for seed in options.seeds:
        for shape in options.shapes:
            for start in options.starts:
                done = [(arm["shape"], arm["start"], arm["seed"]) for arm in read_arms()]
                if (shape, start, seed) in done:
                    continue
                arm = train_arm(shape, start, seed, options.overrides)
                print(json.dumps(arm), flush=True)
                with ARMS.open("a") as file:
                    file.write(json.dumps(arm) + "\n")
    return None


if __name__ == "__main__":
    main()
