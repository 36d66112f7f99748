"""The output of `tritrain plan`: all numbers for a program, or a table for a person."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from launcher.config.file import flat_lines, to_tree
from launcher.plan.disk import disk_of
from launcher.plan.events import events
from launcher.plan.exports import exports_of
from launcher.plan.gpus import UTILIZATION, Gpu
from launcher.plan.memory import checkpoint_bytes, memory_bytes_per_rank, num_ternary_parameters
from launcher.plan.muon import muon_flops
from launcher.plan.plan import Plan
from launcher.plan.sources import drawn_by_source, source_rows
from launcher.plan.traffic import describe_traffic
from launcher.process.console import Console, human_bytes, human_count, human_time
from model.size import flops_per_token, num_parameters

MOST_LINES = 12
"""Of one problem in the table."""


def describe(plan: Plan) -> dict[str, Any]:
    """The numbers that `tritrain plan` prints, by name with unit."""
    config = plan.config
    memory = memory_bytes_per_rank(plan)
    interval = config.checkpoint.interval_steps
    milestones = {phase.end for phase in plan.phases if phase.end > plan.first_step}
    num_saves = len(milestones)
    if interval:  # counted, not listed: there may be millions
        num_saves += (
            plan.total_steps // interval - plan.first_step // interval - sum(end % interval == 0 for end in milestones)
        )
    kept = len(milestones) + config.checkpoint.keep_last
    if not config.checkpoint.keep_last or (config.checkpoint.interval_minutes is None and num_saves < kept):
        kept = num_saves  # and, of those that time decides, as many as the hours bring or none
    flops = flops_per_token(config.model, config.data.sequence_length)
    return {
        "parameters": num_parameters(config.model),
        "ternary_parameters": num_ternary_parameters(plan),
        "flops_per_token": flops,
        "muon_flops_per_step": muon_flops(plan),
        "total_flops": plan.total_flops,
        "ranks": plan.world_size,
        "micro_batches_per_step": plan.most_micro_batches,
        "sequences_per_step": plan.batch.full,
        "tokens_per_step": plan.batch.full * config.data.sequence_length,
        "phases": [
            {
                "precision": phase.precision,
                "objective": phase.objective,
                "peak_learning_rate": plan.curve_at(phase.start).peak,
                "first_step": phase.start,
                "steps": phase.end - phase.start,
                "tokens": plan.tokens_before(phase.end) - plan.tokens_before(phase.start),
                "is_trained": phase.start >= plan.first_step,
            }
            for phase in plan.phases
        ],
        "total_steps": plan.total_steps,
        "total_tokens": plan.total_tokens,
        "bytes_per_rank": {name: round(size) for name, size in memory.items()},
        "total_bytes_per_rank": round(sum(memory.values())),
        "checkpoints_written": num_saves,
        "checkpoint_interval_minutes": config.checkpoint.interval_minutes,
        "checkpoints_kept": kept,
        "checkpoint_bytes": checkpoint_bytes(plan),
    }


def describe_surroundings(
    plan: Plan,
    gpu: tuple[str, Gpu] | None,
    utilization: float,
    missing: Sequence[tuple[str, str]],
    refused: str | None = None,
    checkpoints_there: int = 0,
) -> dict[str, Any]:
    """The needs of a run, in time, disk space and files, and the exports that its model can have.

    Args:
        plan: of the run.
        gpu: name and speed of each rank's GPU; None where there is none that is known.
        utilization: share of the peak that training reaches.
        missing: what the run reads and is missing, or cannot be used: the key, and a sentence.
        refused: why a start would not take the run's folder; None if it would.
        checkpoints_there: complete ones that the run has already.
    """
    numbers, exports = describe(plan), exports_of(plan)
    hours = None
    if gpu is not None:
        hours = numbers["total_flops"] / (utilization * gpu[1].peak_flops_per_second * plan.world_size) / 3600
    return {
        "sources": drawn_by_source(plan),
        "time": {"hours": hours, "gpu": gpu and gpu[0], "utilization": utilization},
        "disk": disk_of(plan, numbers["checkpoints_kept"], checkpoints_there, exports),
        "exports": [{"name": each.name, "problems": each.problems, "bytes": each.num_bytes} for each in exports],
        "missing": [{"key": key, "problem": problem} for key, problem in missing],
        "refused": refused,
    }


def show_plan(
    plan: Plan,
    console: Console,
    *,
    as_json: bool,
    gpu: tuple[str, Gpu] | None = None,
    utilization: float = UTILIZATION,
    missing: Sequence[tuple[str, str]],
    refused: str | None = None,
    checkpoints_there: int = 0,
    counted_as: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print what a run would do and need, and its resolved configuration.

    Args:
        plan: of the run.
        console: to print to.
        as_json: all numbers instead of a table.
        gpu: as in `describe_surroundings`.
        utilization: as there.
        missing: as there.
        refused: as there.
        checkpoints_there: as there.
        counted_as: the keys that are `auto`, each with the value that the plan counts with and the reason, in words.
    """
    tree = to_tree(plan.config)
    numbers = describe(plan) | describe_traffic(plan) | {"events": events(plan), "counted_as": dict(counted_as)}
    surroundings = describe_surroundings(plan, gpu, utilization, missing, refused, checkpoints_there)
    if as_json:
        console.line(json.dumps({"config": tree, "plan": numbers | surroundings}, indent=2))
        return
    rows = plan_rows(numbers) + surrounding_rows(surroundings)
    console.table(f"Plan of {plan.config.run.name}", ["", "value"], rows)
    console.line()
    for line in flat_lines(tree):
        console.line(line)


def surrounding_rows(found: dict[str, Any]) -> list[list[str]]:
    """The rows of the table about what is around the run."""
    time, disk = found["time"], found["disk"]
    took = "not estimated: no GPU that is known here; name one with --gpu, such as --gpu H100"
    if time["hours"] is not None:
        took = f"{human_time(3600 * time['hours'])} at {time['utilization']:.0%} of the peak of {time['gpu']}"
    free = "free space unknown" if disk["free_bytes"] is None else f"{human_bytes(disk['free_bytes'])} free"
    parts = f"{human_bytes(disk['checkpoints_bytes'])} checkpoints, {human_bytes(disk['exports_bytes'])} exports"
    lacks = disk["free_bytes"] is not None and disk["free_bytes"] < disk["needed_bytes"]
    return [
        *source_rows(found["sources"]),
        ["time", took],
        ["disk", f"{parts}; {free} in {disk['place']}{': TOO LITTLE' if lacks else ''}"],
        *[[f"export {each['name']}", _export_in_words(each)] for each in found["exports"]],
        *[[f"missing: {each['key']}", _problem_in_words(each["problem"])] for each in found["missing"]],
        *([] if found["missing"] else [["missing", "nothing"]]),
        *([["a start is refused", _problem_in_words(found["refused"])]] if found["refused"] else []),
    ]


def _problem_in_words(problem: str) -> str:
    """All of it, unless it lists the parameters of a large model."""
    lines = problem.splitlines()
    more = [f"(and {len(lines) - MOST_LINES} more lines, with --json)"] if len(lines) > MOST_LINES else []
    return "\n".join(lines[:MOST_LINES] + more)


def _export_in_words(export: dict[str, Any]) -> str:
    first, *more = export["problems"] or [""]
    if not first:
        return human_bytes(export["bytes"])
    return f"no: {first}" + (f" (and {len(more)} more, with --json)" if more else "")


def _checkpoints_in_words(numbers: dict[str, Any]) -> str:
    minutes, size = numbers["checkpoint_interval_minutes"], human_bytes(numbers["checkpoint_bytes"])
    by_time = "" if minutes is None else f", and after {minutes:g} min without,"
    return f"{numbers['checkpoints_written']}{by_time} of {size}, {numbers['checkpoints_kept']} kept"


def _phase_in_words(index: int, phase: dict[str, Any]) -> str:
    objective = "" if phase["objective"] == "next-token" else f", {phase['objective']}"
    return f"phase {index}: {phase['precision']}{objective}"


def plan_rows(numbers: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    memory, sent = numbers["bytes_per_rank"], numbers["bytes_sent_per_rank_and_step"]
    in_codes = numbers.get("bytes_sent_per_rank_and_step_in_codes")
    muon = numbers["muon_flops_per_step"]
    share = muon / (numbers["flops_per_token"] * numbers["tokens_per_step"])
    return [
        ["parameters", f"{numbers['parameters']:,} ({numbers['ternary_parameters']:,} in layers that become ternary)"],
        ["FLOPs per token", f"{human_count(numbers['flops_per_token'])} (forward and backward)"],
        ["FLOPs of the run", human_count(numbers["total_flops"])],
        *([["FLOPs of Muon", f"{human_count(muon)} a step, {share:.1%} of forward and backward"]] if muon else []),
        ["ranks", str(numbers["ranks"])],
        ["tokens per step", f"{numbers['tokens_per_step']:,} ({numbers['sequences_per_step']} sequences)"],
        ["micro-batches per step", str(numbers["micro_batches_per_step"])],
        *[
            [
                _phase_in_words(index, phase),
                f"{phase['steps']:,} steps, {human_count(phase['tokens'])} tokens"
                + ("" if phase["is_trained"] else ", done before"),
            ]
            for index, phase in enumerate(numbers["phases"])
        ],
        *[[f"step {event['step']:,}", str(event["what"])] for event in numbers["events"]],
        *[[f"bytes per rank: {name}", human_bytes(size)] for name, size in memory.items()],
        ["bytes per rank: all", f"{human_bytes(numbers['total_bytes_per_rank'])} (estimate)"],
        *[[f"sent per rank and step: {what}", human_bytes(size)] for what, size in (sent or {}).items() if size],
        *[[f"sent in codes: {what}", human_bytes(size)] for what, size in (in_codes or {}).items() if size],
        *([] if sent is not None else [["sent per rank and step", "not modeled with these engine.deepspeed keys"]]),
        ["checkpoints", _checkpoints_in_words(numbers)],
        *[[f"{key}: auto", f"counted as {text}"] for key, text in numbers["counted_as"].items()],
    ]
