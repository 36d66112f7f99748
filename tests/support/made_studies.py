"""Folders of studies that never ran, with losses of one's choice."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from studies import write_study

from data.new_paths import replace_file
from launcher.config.file import to_tree
from launcher.plan.plan import Plan
from launcher.run.row_losses import note_row_losses
from launcher.study.arms import Arm, make_arms
from launcher.study.config import load_study
from launcher.study.results import Standing, results_of, switch_step, write_results
from launcher.study.sharing import share

STEPS = 200

BITS = 4 * math.log(2)
"""Nats per token for one bit per byte, where a token has four bytes."""


def make_study(
    folder: Path,
    losses: Callable[[Arm], float | None],
    *,
    rows: Callable[[Arm], list[float]] | None = None,
    spike: float = 0.5,
    num_ranks: int = 1,
    sections: dict[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Write a study's folder, as if its arms had been trained.

    Args:
        folder: to make.
        losses: the held-out loss at the end of each arm; None for an arm that has stopped halfway.
        rows: the loss of each held-out row.
        spike: of the training loss at a switch.
        num_ranks: of each run.
        sections: of the base configuration.
        **keys: of the study.
    """
    given = ({"training": {"total_steps": STEPS}} if "switch" in keys else {}) | (sections or {})
    path = write_study(folder / "files", folder / "shards", given, **keys)
    arms = make_arms(*load_study(path, folder), folder, num_ranks)
    replace_file(folder / "study.yaml", path.read_text())
    begun = {arm.name: Standing(status="not complete", step=0, log=()) for arm in arms}
    write_results(results_of(arms, share(arms), begun), folder)
    for arm in arms:
        _write_arm(folder / "arms" / arm.name, arm, losses(arm), spike)
        if rows is not None:
            at = {"step": arm.plan.total_steps, "phase": len(arm.plan.phases) - 1, "when": "end of phase"}
            note_row_losses(folder / "arms" / arm.name, at, rows(arm), [100] * len(rows(arm)))
    return folder


def _write_arm(folder: Path, arm: Arm, loss: float | None, spike: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"tritrain_version": "0", **to_tree(arm.config)}))
    status = "interrupted" if loss is None else "complete"
    (folder / "state.json").write_text(json.dumps({"status": status, "steps": arm.plan.total_steps}))
    rows = list(_log(arm.plan, arm, loss, spike))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _log(plan: Plan, arm: Arm, loss: float | None, spike: float) -> Any:
    """A loss that falls to its end, with noise that all arms of a seed share, and a spike at the switch."""
    noise, own = random.Random(f"batch {arm.point['seed']}"), random.Random(arm.name)
    switch = switch_step(plan)
    end = 3.0 if loss is None else loss
    for step in range(1, plan.total_steps + 1):
        if loss is None and step > plan.total_steps // 2:
            return
        phase = plan.phase_of(step - 1)
        head = {"tokens": plan.tokens_before(step), "phase": phase.index, "precision": phase.precision}
        value = end + 4 * ((1 + step) ** -0.5 - (1 + plan.total_steps) ** -0.5) + noise.gauss(0, 0.05)
        if switch is not None and step > switch:
            value += spike * math.exp(-(step - switch) / 12) + own.gauss(0, 0.005)
        yield {"step": step, **head, "train/loss": value, "train/learning_rate": 1e-3}
        if step == phase.end:
            here = end if phase.index == len(plan.phases) - 1 else value
            measured = {"validation/loss": here, "validation/bits_per_byte": here / BITS}
            yield {"step": step, **head, **measured, "validation/when": "end of phase"}
            if step < plan.total_steps:
                yield {"step": step, **head, "phase": phase.index + 1, **measured, "validation/when": "start of phase"}
