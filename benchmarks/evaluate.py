"""Eleven tasks by our evaluation, and by lm-evaluation-harness' own `hf` model on the same examples and prompts.

A 16-bit checkpoint is exported with `tritrain export --format hf`, and both evaluate that folder, in its dtype:
`paper11-harness`, whose prompts are lm-evaluation-harness's. Each in a process of its own, in turns; seconds are
those of the tasks, from examples to scores, and do not have the start of the process and the model's loading in them.
Peak memory is the largest resident set of the process, which holds lm-evaluation-harness in either case.

    python benchmarks/evaluate.py RUN --task-data DIR [--limit 25] [--rounds 3] [--batch-sizes 32,1]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import report

from eval.tasks import DEFINITIONS, GROUP, HARNESS, Task, load_rows

ROOT = Path(__file__).resolve().parents[1]
CLI = "from launcher.cli import main; main()"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run or checkpoint, in 16 bits")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="so many examples of each task, its first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="32,1", help="of the hf model")
    parser.add_argument("--name", default="evaluate", help="of the file of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text) / "exported"
        run("-c", CLI, "export", options.model, "--to", str(folder), "--format", "hf")
        variants = {"ours": 0} | {f"hf, batch {size}": int(size) for size in options.batch_sizes.split(",")}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, size in variants.items():
                asked = json.dumps([str(folder), str(options.task_data), options.limit, size])
                rounds[name].append(json.loads(run(__file__, "--one", asked).splitlines()[-1]))
                print(name, f"{sum(rounds[name][-1]['seconds'].values()):.1f} s", flush=True)
        dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    text, numbers = compared(rounds)
    examples = f"the first {options.limit} examples of each" if options.limit else "all examples"
    head = f"{GROUP}{HARNESS}, {examples}, {dtype}; {options.rounds} interleaved rounds, medians."
    report(options.name, f"{head}\n\n{text}", numbers, ("torch", "lm_eval", "transformers"))


def run(*arguments: str) -> str:
    """What a Python process of this checkout prints."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def compared(rounds: dict[str, list[dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """Tables and numbers of all variants; ratios are those of the same round."""
    ours, *others = rounds
    seconds = {
        name: {task: statistics.median(one["seconds"][task] for one in runs) for task in DEFINITIONS}
        for name, runs in rounds.items()
    }
    totals = {name: [sum(one["seconds"].values()) for one in runs] for name, runs in rounds.items()}
    examples, first = rounds[ours][0]["examples"], {name: runs[0] for name, runs in rounds.items()}
    lines = ["| seconds | examples | " + " | ".join(rounds) + " |", "| --- " * (2 + len(rounds)) + "|"]
    for task in DEFINITIONS:
        lines.append(f"| {task} | {examples[task]} | " + " | ".join(f"{seconds[n][task]:.2f}" for n in rounds) + " |")
    numbers: dict[str, Any] = {}
    for name, runs in rounds.items():
        pairs = zip(totals[name], totals[ours], strict=True)
        numbers[name] = {
            "seconds": round(statistics.median(totals[name]), 2),
            "examples_per_second": round(sum(examples.values()) / statistics.median(totals[name]), 1),
            "times_ours": round(statistics.median(theirs / mine for theirs, mine in pairs), 2),
            "load_seconds": round(statistics.median(one["load_seconds"] for one in runs), 1),
            "peak_gib": round(max(one["peak_gib"] for one in runs), 2),
        }
    for label, key in (
        ("all", "seconds"),
        ("examples per second", "examples_per_second"),
        ("times ours", "times_ours"),
        ("loading, seconds", "load_seconds"),
        ("peak memory, GiB", "peak_gib"),
    ):
        count = sum(examples.values()) if label == "all" else ""
        lines.append(f"| {label} | {count} | " + " | ".join(str(numbers[name][key]) for name in rounds) + " |")
    lines.append("")
    for name in others:
        differing = [task for task in DEFINITIONS if first[name]["score"][task] != first[ours]["score"][task]]
        pairs = [
            (mine, theirs)
            for task in DEFINITIONS
            for mine, theirs in zip(first[ours]["nats"][task], first[name]["nats"][task], strict=True)
        ]
        largest = max(abs(mine - theirs) / abs(mine) for mine, theirs in pairs)
        numbers[name] |= {"differing_scores": differing, "largest_relative_difference": largest}
        equal = f"{', '.join(differing)} differ" if differing else "all eleven are equal"
        lines.append(
            f"Scores of {name} against ours: {equal}. Of {len(pairs):,} log-likelihoods none differs by more than "
            f"{largest:.1e} of its value."
        )
    return "\n".join(lines), numbers


def one(folder: str, task_data: str, limit: int | None, batch_size: int) -> None:
    """Print what one process finds: ours where there is no batch size, else lm-evaluation-harness' model."""
    from data.torchvision_repair import repair_torchvision

    repair_torchvision()
    from eval.harness import Encoding, answer_questions, ask, open_questions
    from eval.score import scores_of
    from eval.tasks import harness_task
    from launcher.inference.sharded import open_subject
    from launcher.process.ranks import process_group

    found: dict[str, Any] = {key: {} for key in ("seconds", "examples", "score", "nats")}
    with process_group(600) as ranks:
        began = time.perf_counter()
        if batch_size:
            from lm_eval.models.huggingface import HFLM

            options = {"dtype": "auto", "device": str(ranks.device), "batch_size": batch_size}
            model: Any = HFLM(pretrained=folder, add_bos_token=False, **options)  # our exports say: one in front
        else:
            subject = open_subject(folder, ranks)
            encoding = Encoding(subject.tokenizer, subject.first_token)
        found["load_seconds"] = time.perf_counter() - began
        for name, definition in DEFINITIONS.items():
            rows = load_rows(Task(name, True), Path(task_data))[:limit]
            began = time.perf_counter()
            if batch_size:
                answered = ask(harness_task(name, rows), model)
            else:
                questions = open_questions(name, rows, encoding, subject.scorer.window_tokens)
                answered = answer_questions(name, questions, subject.scorer)
            found["score"][name] = scores_of(answered, definition.metric)[definition.metric].value
            found["seconds"][name] = time.perf_counter() - began
            found["examples"][name] = len(rows)
            found["nats"][name] = [value for example in answered for value in example.log_likelihoods]
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*json.loads(sys.argv[2]))
    else:
        main()
