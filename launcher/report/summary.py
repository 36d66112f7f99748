"""Summarize a run in numbers, from its folder.

`summarize` reads `config.yaml`, `metrics.jsonl` and, once the run is complete, `summary.json`, of a run that is still
going or was interrupted as well.

Everything measured comes from `metrics.jsonl`. The training loss of a phase is its level at the end (see
`launcher.run.level`), its throughput the median over its logged steps, its validation the last evaluation after its
start.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.config import Content
from launcher.config.file import parse_yaml
from launcher.errors import ConfigError, LogError
from launcher.plan.objectives import LEARNED_FROM
from launcher.process.console import human_count
from launcher.report.history import (
    AVERAGED,
    BITS_PER_BYTE,
    LOSS,
    History,
    PhaseSpan,
    Series,
    find_transitions,
    is_of_other_text,
    read_history,
)
from launcher.run.log_keys import DRAWN, REWARD_ACCURACY
from launcher.run.recovery import Transition
from launcher.run.requeue import read_lines
from launcher.run.samples import Sample, read_samples

THROUGHPUT = "throughput/tokens_per_second"

CONFIG_KINDS: Mapping[str, Any] = {
    "": dict,
    "run": dict,
    "engine": dict,
    "phase_steps": list,
    "phase_steps.*": int,
    "phases": list,
    "phases.*": dict,
}

SUMMARY_KINDS: Mapping[str, Any] = {
    "": dict,
    "elapsed_seconds": int | float,
    "num_ranks": int,
    "num_parameters": int,
    "num_ternary_parameters": int,
}
"""The types of what is read, by key; `null` may be anywhere but at the top."""


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """One phase of a run; a value that has not been measured is None."""

    index: int
    precision: str
    content: Content
    """What it learns from."""
    steps: int
    planned_steps: int | None
    tokens: int
    train_loss: float | None
    """Level of the training loss at the end, nats per token."""
    validation_bits_per_byte_at_start: float | None
    validation_bits_per_byte: float | None
    """Last evaluation after the phase's first step."""
    averaged_bits_per_byte: float | None
    """The same of the averaged weights."""
    tokens_per_second: float | None
    """Median over the logged steps, all ranks together."""
    model_flops_utilization: float | None
    """Median over the logged steps, 0 to 1."""
    tokens_by_source: Mapping[str, int]
    """Tokens that the phase has drawn from each source; empty in a run with a single one."""
    is_of_other_text: bool
    """Whether its losses are of another text, or of chats, than those of the phase before."""

    pairs_in_order: float | None
    """Share of the held-out pairs whose chosen answer has gained more, 0 to 1; None in other phases."""

    @property
    def label(self) -> str:
        """Precision, and what it learns from if that is not text."""
        return self.precision if self.content == "text" else f"{self.precision}, {self.content}"

    @property
    def is_complete(self) -> bool:
        """Return whether the run has finished all of its steps."""
        return self.planned_steps is not None and self.steps >= self.planned_steps


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in numbers. What only a complete run writes down (parameters) is None before."""

    folder: Path
    name: str
    seed: int | None
    tritrain_version: str | None
    engine: str | None
    """One, or those of several starts with the step from which on each has trained."""
    num_ranks: str | None
    """As `engine`."""
    is_complete: bool
    step: int
    planned_steps: int | None
    tokens: int
    elapsed_seconds: float | None
    skipped_steps: int | None
    num_parameters: int | None
    num_ternary_parameters: int | None
    phases: tuple[PhaseSummary, ...]
    transitions: tuple[Transition, ...]
    samples: tuple[Sample, ...]
    config_text: str = field(repr=False)
    history: History = field(repr=False, compare=False)

    @property
    def throughput_ratio(self) -> float | None:
        """Median tokens per second of the last ternary phase over those of the first 16-bit phase."""
        first_16_bit = next((p.tokens_per_second for p in self.phases if p.precision == "16-bit"), None)
        ternary = next((p.tokens_per_second for p in reversed(self.phases) if p.precision == "ternary"), None)
        return ternary / first_16_bit if ternary and first_16_bit else None


def summarize(run: Path) -> RunSummary:
    """Read a run's folder and compute its phases and transitions.

    Raises FileNotFoundError where `run` is not a run's folder, and LogError, with file and line, for a file that
    cannot be understood.
    """
    config_path, metrics_path, summary_path = (run / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    for path, what in ((config_path, "it is not a run's folder"), (metrics_path, "the run has logged nothing yet")):
        if not path.is_file():
            raise FileNotFoundError(f"{run} has no {path.name}: {what}")
    try:
        config_text = config_path.read_text(encoding="utf-8")
        config = parse_yaml(config_text, str(config_path))
    except ConfigError as error:
        raise LogError(str(error)) from None
    except UnicodeDecodeError as error:
        raise LogError(f"{config_path}: is not UTF-8 text: {error}") from None
    summary: Any = {}
    if summary_path.is_file():
        try:
            summary = json.loads(summary_path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise LogError(f"{summary_path}: not JSON: {error}") from None
    _check(config_path, config, CONFIG_KINDS)
    _check(summary_path, summary, SUMMARY_KINDS)
    of_run, engine, planned = (
        config.get(key, empty) for key, empty in (("run", {}), ("engine", {}), ("phase_steps", []))
    )
    contents = {
        index: LEARNED_FROM.get(phase.get("objective"), "text")
        for index, phase in enumerate(config.get("phases") or [])
    }
    transitions = {index: phase.get("transition") for index, phase in enumerate(config.get("phases") or [])}
    begin_averaged = {
        index for index, each in transitions.items() if isinstance(each, dict) and each.get("weights") == "averaged"
    }
    name = str(of_run.get("name", run.name))
    history = read_history(metrics_path, name)
    elapsed, skipped = (_last(history, key) for key in ("time/elapsed_seconds", "train/skipped_steps"))
    starts = _starts(run / "starts.jsonl") or [(0, {"world_size": summary.get("num_ranks")})]
    return RunSummary(
        folder=run,
        name=name,
        seed=of_run.get("seed"),
        tritrain_version=config.get("tritrain_version"),
        engine=_by_start([(step, _engine_text(start.get("engine") or engine)) for step, start in starts]),
        num_ranks=_by_start([(step, _count_text(start.get("world_size"))) for step, start in starts]),
        is_complete=summary.get("status") == "complete",
        step=history.phases[-1].last_step,
        planned_steps=sum(planned) if planned and None not in planned else None,
        tokens=history.phases[-1].last_tokens,
        elapsed_seconds=summary.get("elapsed_seconds", elapsed),
        skipped_steps=None if skipped is None else int(skipped),
        num_parameters=summary.get("num_parameters"),
        num_ternary_parameters=summary.get("num_ternary_parameters"),
        phases=tuple(_summarize_phase(history, span, dict(enumerate(planned)), contents) for span in history.phases),
        transitions=find_transitions(history, begin_averaged),
        samples=tuple(read_samples(run)),
        config_text=config_text,
        history=history,
    )


def _check(path: Path, content: Any, kinds: Mapping[str, Any]) -> None:
    """Raise LogError if a part of a file is of another type than runs write."""
    for key, kind in kinds.items():
        found = [content]
        for part in key.split(".") if key else ():
            found = [each.get(part) for each in found if each is not None] if part != "*" else [*(found[0] or ())]
        for value in found:
            if not isinstance(value, kind) and (value is not None or not key):
                what = (
                    "a mapping of keys"
                    if kind is dict
                    else "a list"
                    if kind is list
                    else "text"
                    if kind is str
                    else "a number"
                )
                raise LogError(f"{path}: {key and f'{key} '}must hold {what}, not {str(value)[:40]!r}")


def verdict(summary: RunSummary) -> str:
    """Say in one sentence where each phase ended, and how far that is from the phase before, per cent."""
    values = [phase.validation_bits_per_byte for phase in summary.phases]
    unit = "bits per byte"
    if None in values:
        values, unit = [phase.train_loss for phase in summary.phases], "nats per token of training loss"
    clauses: list[str] = []
    for position, (phase, value) in enumerate(zip(summary.phases, values, strict=True)):
        of = "" if phase.content == "text" else f" of {phase.content}"
        if value is None:
            clauses.append(f"the {phase.precision} phase{of} has no measurement yet")
            continue
        before = values[position - 1] if position and not phase.is_of_other_text else None
        is_over = summary.is_complete or phase.is_complete or phase is not summary.phases[-1]
        clause = f"the {phase.precision} phase{of} {'ended' if is_over else 'stands'}"
        if phase.pairs_in_order is not None:
            clauses.append(f"{clause} with {phase.pairs_in_order:.1%} of the held-out pairs in order")
            continue
        clause += f" at {value:.3f}"
        change = f" ({percent(value, before)} after {human_count(phase.tokens)} tokens more)" if before else ""
        clauses.append(clause + (f" {unit}" if not clauses else "") + (" of answers" if of else "") + change)
    text = ", ".join(clauses) + "."
    if summary.is_complete:
        return text[0].upper() + text[1:]
    share = (
        f" of {summary.planned_steps:,} ({summary.step / summary.planned_steps:.0%})" if summary.planned_steps else ""
    )
    return f"Unfinished, at step {summary.step:,}{share}: {text}"


COMPARED = (
    "Figures of two phases differ by the precision and by the training in between. What ternary weights cost is the "
    "distance from a 16-bit run of as many tokens; what the switch costs, that of the values right before and after it."
)
"""What a difference between the ends of two phases is not."""


def samples_by_prompt(summary: RunSummary) -> dict[str, dict[str, str]]:
    """By prompt, what the model has written to it, by where it was."""
    labels = {phase.index: phase.label for phase in summary.phases}
    found: dict[str, dict[str, str]] = {}
    for each in summary.samples:
        where = "before training" if each.is_start else f"{labels.get(each.phase, 'phase')}, step {each.step:,}"
        found.setdefault(each.prompt, {})[where] = each.completion
    return found


def spike_text(transition: Transition) -> str:
    """The height of the spike with its noise, and where it is."""
    if not math.isfinite(transition.spike):
        return "the loss is not finite"
    noise = f" \N{PLUS-MINUS SIGN} {transition.noise:.3f}"
    if math.isnan(transition.noise):
        noise = ", with too few logged losses to know the noise"
    text = f"{signed(transition.spike, 3)}{noise}"
    if math.isnan(transition.noise) or transition.is_beyond_noise:
        steps = transition.peak_steps
        return f"{text}, {f'{count_of_steps(steps)} after the switch' if steps else 'at the switch'}"
    return f"no spike beyond noise ({text})"


def recovery_text(transition: Transition) -> str:
    """When the loss was back at its level before the switch."""
    if transition.recovery_steps is None or transition.recovery_tokens is None:
        return "not yet"
    return f"{count_of_steps(transition.recovery_steps)} ({human_count(transition.recovery_tokens)} tokens)"


def percent(value: float, before: float) -> str:
    """A relative change, per cent."""
    return f"{signed(100 * (value / before - 1), 1)} %"


def count_of_steps(count: int) -> str:
    """Write a number of steps."""
    return f"{count:,} step{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a time in its two largest units: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    for size, unit, part_size, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if round(seconds / part_size) * part_size >= size:
            count, rest = divmod(round(seconds / part_size) * part_size, size)
            return f"{count} {unit} {rest // part_size} {part}"
    return f"{seconds:.3g} s"


def signed(value: float, digits: int) -> str:
    """Write a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _summarize_phase(
    history: History, span: PhaseSpan, planned_steps: Mapping[int, int | None], contents: Mapping[int, Content]
) -> PhaseSummary:
    parts = {key: series.of_phase(span.index) for key, series in history.series.items()}
    loss, evaluations = parts.get(LOSS), parts.get(BITS_PER_BYTE)
    at_start = at_end = None
    for step, value in zip(evaluations.steps, evaluations.values, strict=True) if evaluations else ():
        at_start, at_end = (float(value), at_end) if step == span.first_step else (at_start, float(value))
    return PhaseSummary(
        index=span.index,
        precision=span.precision,
        content=contents.get(span.index, "text"),
        steps=span.last_step - span.first_step,
        planned_steps=planned_steps.get(span.index),
        tokens=span.last_tokens - span.first_tokens,
        train_loss=loss.last_level(span.first_step) if loss and len(loss.values) else None,
        validation_bits_per_byte_at_start=at_start,
        validation_bits_per_byte=at_end,
        averaged_bits_per_byte=_last_of(parts.get(AVERAGED)),
        tokens_per_second=_median(parts.get(THROUGHPUT)),
        model_flops_utilization=_median(parts.get("throughput/model_flops_utilization")),
        tokens_by_source=_drawn(history, span.index),
        is_of_other_text=is_of_other_text(history, span.index),
        pairs_in_order=_last_of(parts.get(f"validation/{REWARD_ACCURACY}")),
    )


def _drawn(history: History, phase: int) -> dict[str, int]:
    """Tokens by source: the last count of a phase, less the last one before it."""
    found = {}
    for key, series in history.series.items():
        if key.startswith(DRAWN):
            by_end, before = (series.values[of] for of in (series.phases <= phase, series.phases < phase))
            if tokens := int(by_end.max(initial=0)) - int(before.max(initial=0)):
                found[key.removeprefix(DRAWN)] = tokens
    return found


def _median(series: Series | None) -> float | None:
    return float(np.median(series.values)) if series and len(series.values) else None


def _last(history: History, key: str) -> float | None:
    return _last_of(history.series.get(key))


def _last_of(series: Series | None) -> float | None:
    return float(series.values[-1]) if series and len(series.values) else None


def _starts(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The starts that steps of the run are left of, by the step that each began after."""
    starts: list[tuple[int, dict[str, Any]]] = []
    for start in read_lines(path, "step"):
        step = start["step"]
        starts = [*((before, other) for before, other in starts if before < step), (step, start)]
    return starts


def _by_start(values: Sequence[tuple[int, str | None]]) -> str | None:
    """A value that all starts share, or each value with the step from which on it holds."""
    known = [(step, value) for step, value in values if value is not None]
    changes = known[:1] + [after for before, after in pairwise(known) if after[1] != before[1]]
    if len(changes) < 2:
        return changes[0][1] if changes else None
    return "; ".join(f"{value} from step {step + 1:,}" for step, value in changes)


def _engine_text(engine: Mapping[str, Any]) -> str | None:
    name, zero_stage = engine.get("name"), engine.get("zero_stage")
    return name if zero_stage is None else f"{name}, ZeRO stage {zero_stage}"


def _count_text(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"
