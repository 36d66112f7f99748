"""Files of runs that never were, with known numbers."""

import json
import math
import random
from pathlib import Path

TOKENS_PER_STEP = 32_768


def make_run(
    folder: Path,
    *,
    name: str = "demo",
    phase_steps: tuple[int, ...] = (800, 200),
    done_steps: int | None = None,
    log_every: int = 1,
    evaluate_every: int = 100,
    spike: float = 0.8,
    ramp_steps: int = 0,
    noise: float = 0.02,
    completion: str = " was a small kingdom.",
) -> Path:
    """Write a run's folder: power-law loss, at the switch to ternary a spike that decays, and a small lasting loss."""
    rng = random.Random(name)
    total = sum(phase_steps)
    done_steps = total if done_steps is None else done_steps
    folder.mkdir(parents=True)
    precisions = ["16-bit", "ternary", "16-bit"][: len(phase_steps)]
    config = [f"tritrain_version: 0.1.0\nrun:\n  name: {json.dumps(name)}\n  seed: 17\nphases:\n"]
    config += [f"- precision: {p}\n  steps: {n}\n" for p, n in zip(precisions, phase_steps, strict=True)]
    config += ["engine:\n  name: deepspeed\n  zero_stage: 2\n", f"phase_steps: {list(phase_steps)}\n"]
    (folder / "config.yaml").write_text("".join(config))
    lines, start = [], 0

    def add(step: int, phase: int, **values: object) -> None:
        head = {"step": step, "tokens": step * TOKENS_PER_STEP, "phase": phase, "precision": precisions[phase]}
        lines.append(json.dumps(head | values) + "\n")

    def level(step: int, phase: int) -> float:
        loss = 2.2 + 8 * (1 + step) ** -0.5
        if phase and ramp_steps and step - start < ramp_steps:
            return loss + (spike + 0.05) * (step - start) / ramp_steps
        return loss + phase * 0.05 + (spike * math.exp(-(step - start - ramp_steps) / 15) if phase else 0)

    def evaluate(step: int, phase: int, when: str) -> None:
        loss = level(step, phase)
        values = {"validation/loss": loss, "validation/bits_per_byte": loss / math.log(2) / 4, "validation/when": when}
        add(step, phase, **values)

    for phase, (precision, num_steps) in enumerate(zip(precisions, phase_steps, strict=True)):
        if start > done_steps:
            break
        evaluate(start, phase, "start of phase")
        for step in range(start + 1, min(start + num_steps, done_steps) + 1):
            strength = min(1.0, (step - start) / ramp_steps) if ramp_steps else 1.0
            if step % log_every == 0:
                values = {
                    "train/loss": level(step, phase) + rng.gauss(0, noise),
                    "train/grad_norm": math.exp(rng.gauss(-1, 0.3)),
                    "train/learning_rate": 3e-4 * min(1, step / 50) * (1 - 0.9 * step / total),
                    "quant/strength": strength if precision == "ternary" else 0.0,
                    "throughput/tokens_per_second": (80_000 if precision == "ternary" else 100_000) + rng.gauss(0, 900),
                    "memory/peak_gib": 11.5 + phase,
                    "data/wait_share": abs(rng.gauss(0, 0.01)),
                    "train/skipped_steps": 2,
                    "time/elapsed_seconds": 0.4 * step,
                }
                add(step, phase, **values)
            if step == start + num_steps:
                evaluate(step, phase, "end of phase")
            elif step % evaluate_every == 0:
                evaluate(step, phase, "interval")
        start += num_steps
    (folder / "metrics.jsonl").write_text("".join(lines))
    if done_steps == total:
        summary = {
            "status": "complete",
            "num_parameters": 124_400_000,
            "num_ternary_parameters": 84_900_000,
            "tokens": total * TOKENS_PER_STEP,
            "elapsed_seconds": 4210.0,
            "num_ranks": 4,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    ends = [sum(phase_steps[: index + 1]) for index in range(len(phase_steps))]
    samples = [
        {"step": end, "phase": index, "is_start": False, "prompt": "Once upon a time there", "completion": completion}
        for index, end in enumerate(ends)
        if end <= done_steps
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder
