"""Does a ternary model gain as much from fine-tuning on chats as a 16-bit one?

A small model is trained on real English, then on questions with answers, as chats. Three ways of the same number of
steps, with one learning-rate curve: 16 bits throughout; ternary from 60 % of the text on; and 16 bits on text and on
half of the chats, ternary on the other half, with and without the 16-bit model as a teacher. The loss is that of the
answers of held-out chats, before the first chat and at the end.

    python benchmarks/fine_tuning.py --data PRETRAIN --tasks EVAL [--text 1600] [--chats 320] [--seeds 3]

PRETRAIN holds `train-*.jsonl.zst` and `val.jsonl.zst`, with a "text" in every line; EVAL holds `TASK_validation.jsonl`,
which are trained on, and `TASK_test.jsonl`, which are held out, with "query", "choices" and "gold" in every line.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from measure import report
from quantizers import model_and_data, run

from data.shards import PrepareConfig, prepare
from launcher.config.file import load_config
from launcher.run.metrics_log import read_metrics

TASKS = ("sciq", "arc_easy", "openbookqa")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% else %}Answer: {{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)
LENGTH = 128

Phases = list[dict[str, Any]]


def ways(text: int, chats: int, sources: list[dict[str, str]]) -> dict[str, Phases]:
    """The phases of each way to an answering model."""
    about = {"objective": "sft", "sources": sources}
    half = {"precision": "16-bit", "steps": chats // 2, **about}
    ternary_half = {"precision": "ternary", "steps": chats - chats // 2, "objective": "sft"}
    words = {"precision": "16-bit", "steps": text}
    return {
        "16 bits": [words, {"precision": "16-bit", "steps": chats, **about}],
        "ternary": [
            words | {"steps": round(0.6 * text)},
            {"precision": "ternary", "steps": text - round(0.6 * text)},
            {"precision": "ternary", "steps": chats, **about},
        ],
        "16 bits, then ternary": [words, half, ternary_half],
        "16 bits, then ternary with a teacher": [
            words,
            half,
            ternary_half | {"distillation": {"weight": 0.25, "temperature": 2.0}},
        ],
    }


def write_chats(tasks: Path, split: str, path: Path) -> int:
    """Write the questions and right answers of a split as chats; how many."""
    lines = []
    for task in TASKS:
        for line in (tasks / f"{task}_{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            question = row["query"].strip().removeprefix("Question:").removesuffix("Answer:").strip()
            messages = [("user", question), ("assistant", row["choices"][row["gold"]])]
            lines.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return len(lines)


def overrides_of(options: argparse.Namespace, folder: Path, name: str, phases: Phases, seed: int) -> list[str]:
    """The run of one way and seed."""
    return [
        f"run.folder={folder / name}",
        f"run.seed={seed}",
        *model_and_data(options.data, folder, seed),
        "model.sub_norm=true",
        "optimizer.learning_rate=3e-3",
        "phases=" + json.dumps(phases),
        f"schedule.decay_fraction={options.chats / (options.text + options.chats)}",
        "checkpoint.interval_steps=null",
        "evaluation={}",
        "logging.tensorboard=false",
    ]


def of_seed(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, tuple[float, float]]:
    """The loss of held-out answers before and after, for each way."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for number, (name, phases) in enumerate(ways(options.text, options.chats, [{"path": f"{folder}/chats"}]).items()):
        overrides = overrides_of(options, folder, f"{number}-{seed}", phases, seed)
        config = load_config(Path("configs/english-4m.yaml"), overrides)
        run(config)
        first = next(index for index, phase in enumerate(phases) if phase.get("objective") == "sft")
        measured = [row for row in read_metrics(config.run.path / "metrics.jsonl") if row.get("validation/when")]
        before = [row for row in measured if row["phase"] == first and row["validation/when"] == "start of phase"]
        found[name] = (before[0]["validation/loss"], measured[-1]["validation/loss"])
        shutil.rmtree(config.run.path)
        print(f"{name}, seed {seed}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Train all ways with all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--text", type=int, default=1600)
    parser.add_argument("--chats", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(Path("configs/english-4m.yaml"), model_and_data(options.data, folder, 0))
        assert config.data.prepare is not None
        prepare(config.data.prepare, LENGTH, folder / "shards")
        (folder / "template.jinja").write_text(TEMPLATE)
        counts = {
            split: write_chats(options.tasks, split, folder / f"{split}.jsonl") for split in ("validation", "test")
        }
        chats = PrepareConfig(
            inputs=(str(folder / "validation.jsonl"),),
            validation_inputs=(str(folder / "test.jsonl"),),
            tokenizer=str(folder / "shards" / "tokenizer.model"),
            content="chats",
            chat_template=str(folder / "template.jinja"),
            too_long="drop",
        )
        prepare(chats, LENGTH, folder / "chats")
        # A process for each seed: `streaming` keeps the shared memory of every data set open.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = pool.starmap(of_seed, [(options, folder, seed) for seed in range(options.seeds)], chunksize=1)
    write(found, options, counts)


def write(found: list[dict[str, tuple[float, float]]], options: argparse.Namespace, counts: dict[str, int]) -> None:
    """The table."""
    lines = ["| way | before | at the end | range | gain | range |", "| --- | ---: | ---: | --- | ---: | --- |"]
    for name in found[0]:
        before, after = zip(*(each[name] for each in found), strict=True)
        gains = [start - end for start, end in zip(before, after, strict=True)]
        cells = [name, f"{statistics.mean(before):.4f}"]
        for values in (after, gains):
            cells += [f"{statistics.mean(values):.4f}", f"{min(values):.4f} to {max(values):.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"A model of 4 blocks of width 64: {options.text} steps of 8 x 128 tokens of text, then {options.chats} of "
        f"{counts['validation']:,} chats, which are read several times. Losses of the answers of {counts['test']:,} "
        f"held-out chats, in nats per token, means over {options.seeds} seeds and their ranges.\n\n" + "\n".join(lines)
    )
    report("fine-tuning", text, {"seeds": found})


if __name__ == "__main__":
    main()
