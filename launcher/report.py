"""What a run's folder says: a summary in numbers, a page to read, a picture to show.

`summarize` reads `config.yaml`, `metrics.jsonl` and, once the run is complete, `summary.json`. `write_report` puts one
or several runs on a single HTML page that loads nothing from anywhere; `write_picture` draws the loss curve as a PNG.
All of them work on a run that is still going or was interrupted.

Everything measured comes from `metrics.jsonl`. The training loss of a phase is its smoothed loss at the end (see
`launcher.curves`), its throughput the median over its logged steps, its validation the last evaluation after its start.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise, zip_longest
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from launcher.console import human_count
from launcher.curves import (
    LOSS,
    History,
    PhaseSpan,
    Series,
    find_transitions,
    read_history,
)
from launcher.plots import (
    PANELS,
    THEME,
    loss_figure,
    overview_window,
    panel_figure,
    save_png,
    to_svg,
    transition_figure,
)
from launcher.spike import WINDOW, Transition

MISSING = "\N{EM DASH}"
BITS_PER_BYTE, THROUGHPUT = "validation/bits_per_byte", "throughput/tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """One phase of a run; a value that has not been measured is None."""

    index: int
    precision: str
    steps: int
    planned_steps: int | None
    tokens: int
    train_loss: float | None
    """Smoothed training loss at the end, nats per token."""
    validation_bits_per_byte_at_start: float | None
    validation_bits_per_byte: float | None
    """Last evaluation after the phase's first step."""
    tokens_per_second: float | None
    """Median over the logged steps, all ranks together."""
    model_flops_utilization: float | None
    """Median over the logged steps, 0 to 1."""

    @property
    def is_complete(self) -> bool:
        """Whether it has done all the steps it was to do."""
        return self.planned_steps is not None and self.steps >= self.planned_steps


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in numbers. What only a complete run writes down (parameters, sample) is None before."""

    folder: Path
    name: str
    seed: int | None
    tritrain_version: str | None
    engine: str | None
    num_ranks: int | None
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
    sample_prompt: str | None
    sample_completion: str | None
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

    Raises FileNotFoundError where `run` is not a run's folder, and ValueError, with file and line, for a file that
    cannot be understood.
    """
    config_path, metrics_path, summary_path = (run / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    for path, what in ((config_path, "it is not a run's folder"), (metrics_path, "the run has logged nothing yet")):
        if not path.is_file():
            raise FileNotFoundError(f"{run} has no {path.name}: {what}")
    config_text = config_path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise ValueError(f"{config_path}: not YAML: {error}") from None
    summary: dict[str, Any] = {}
    if summary_path.is_file():
        try:
            summary = json.loads(summary_path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{summary_path}: not JSON: {error}") from None
    name, engine = str(config.get("run", {}).get("name", run.name)), config.get("engine", {})
    history = read_history(metrics_path, name)
    planned = config.get("phase_steps", [])
    elapsed, skipped = (_last(history, key) for key in ("time/elapsed_seconds", "train/skipped_steps"))
    sample = summary.get("sample") or {}
    return RunSummary(
        folder=run,
        name=name,
        seed=config.get("run", {}).get("seed"),
        tritrain_version=config.get("tritrain_version"),
        engine=_engine_text(engine.get("name"), engine.get("zero_stage")),
        num_ranks=summary.get("num_ranks"),
        is_complete=summary.get("status") == "complete",
        step=history.phases[-1].last_step,
        planned_steps=sum(planned) if planned and None not in planned else None,
        tokens=history.phases[-1].last_tokens,
        elapsed_seconds=summary.get("elapsed_seconds", elapsed),
        skipped_steps=None if skipped is None else int(skipped),
        num_parameters=summary.get("num_parameters"),
        num_ternary_parameters=summary.get("num_ternary_parameters"),
        phases=tuple(_summarize_phase(history, span, dict(enumerate(planned))) for span in history.phases),
        transitions=find_transitions(history),
        sample_prompt=sample.get("prompt"),
        sample_completion=sample.get("completion"),
        config_text=config_text,
        history=history,
    )


def verdict(summary: RunSummary) -> str:
    """Say in one sentence where each phase ended, and how far that is from the phase before, per cent."""
    values = [phase.validation_bits_per_byte for phase in summary.phases]
    unit = "bits per byte"
    if None in values:
        values, unit = [phase.train_loss for phase in summary.phases], "nats per token of training loss"
    clauses: list[str] = []
    for position, (phase, value) in enumerate(zip(summary.phases, values, strict=True)):
        if value is None:
            clauses.append(f"the {phase.precision} phase has no measurement yet")
            continue
        before = values[position - 1] if position else None
        is_over = summary.is_complete or phase.is_complete or phase is not summary.phases[-1]
        clause = f"the {phase.precision} phase {'ended' if is_over else 'stands'} at {value:.3f}"
        change = f" ({_signed(100 * (value / before - 1), 1)} %)" if before else ""
        clauses.append(clause + (f" {unit}" if not clauses else "") + change)
    text = ", ".join(clauses) + "."
    if summary.is_complete:
        return text[0].upper() + text[1:]
    share = (
        f" of {summary.planned_steps:,} ({summary.step / summary.planned_steps:.0%})" if summary.planned_steps else ""
    )
    return f"Unfinished, at step {summary.step:,}{share}: {text}"


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML page about one or several runs."""
    summaries = [summarize(run) for run in runs]
    labels = [s.name if len(summaries) == 1 else f"{i}: {s.name}" for i, s in enumerate(summaries, start=1)]
    names = ", ".join(summary.name for summary in summaries)
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(names if len(summaries) == 1 else f"{len(summaries)} runs: {names}"),
        light=" ".join(f"--{name}: {light};" for name, (light, _) in THEME.items()),
        dark=" ".join(f"--{name}: {dark};" for name, (_, dark) in THEME.items()),
        verdicts="\n".join(_verdict_paragraphs(summaries, labels)),
        body="\n".join(_body(summaries, labels)),
    )
    out.write_text(page, encoding="utf-8", errors="replace")


def write_picture(run: Path, out: Path) -> None:
    """Write the loss curve of one run, with its switches and validation points, as a PNG."""
    summary = summarize(run)
    save_png(loss_figure([summary.history], title=summary.name), out)


def _summarize_phase(history: History, span: PhaseSpan, planned_steps: Mapping[int, int | None]) -> PhaseSummary:
    parts = {key: series.of_phase(span.index) for key, series in history.series.items()}
    loss, evaluations = parts.get(LOSS), parts.get(BITS_PER_BYTE)
    at_start = at_end = None
    for step, value in zip(evaluations.steps, evaluations.values, strict=True) if evaluations else ():
        at_start, at_end = (float(value), at_end) if step == span.first_step else (at_start, float(value))
    return PhaseSummary(
        index=span.index,
        precision=span.precision,
        steps=span.last_step - span.first_step,
        planned_steps=planned_steps.get(span.index),
        tokens=span.last_tokens - span.first_tokens,
        train_loss=float(loss.smoothed(WINDOW)[-1]) if loss and len(loss.values) else None,
        validation_bits_per_byte_at_start=at_start,
        validation_bits_per_byte=at_end,
        tokens_per_second=_median(parts.get(THROUGHPUT)),
        model_flops_utilization=_median(parts.get("throughput/model_flops_utilization")),
    )


def _median(series: Series | None) -> float | None:
    return float(np.median(series.values)) if series and len(series.values) else None


def _last(history: History, key: str) -> float | None:
    return float(history.series[key].values[-1]) if key in history.series else None


def _engine_text(name: str | None, zero_stage: int | None) -> str | None:
    return name if zero_stage is None else f"{name}, ZeRO stage {zero_stage}"


def _body(summaries: Sequence[RunSummary], labels: Sequence[str]) -> Iterator[str]:
    """Yield the page's parts from top to bottom."""
    histories = [summary.history for summary in summaries]
    yield "<h2>In numbers</h2>"
    yield _table(("", *labels), _fact_rows(summaries))
    yield "<h2>Phases</h2>"
    yield _table(_PHASE_COLUMNS, _phase_rows(summaries))
    windows = (
        " and ".join(sorted({str(overview_window(h.series[LOSS])) for h in histories if LOSS in h.series})) or "no"
    )
    yield "<h2>Loss</h2>"
    yield _figure(
        to_svg(loss_figure(histories), "loss", "training and validation loss over tokens"),
        f"Faint: every logged training loss. Bold: its exponential moving average over {windows} logged values "
        "(bias-corrected, starting anew in every phase). The axis fits what comes after the first 2 % of the tokens. "
        "Shaded: ternary phases. Points: validation.",
        is_large=True,
    )
    transitions = [summary.transitions for summary in summaries]
    if any(transitions):
        yield "<h2>Transitions</h2>"
        header, *rows = _transition_rows(summaries)
        yield _table(header, rows)
        yield '<div class="grid">'
        for number, group in enumerate(zip_longest(*transitions), start=1):
            svg = to_svg(transition_figure(histories, group), f"transition-{number}", f"loss around switch {number}")
            yield _figure(
                svg,
                "Dotted: the smoothed loss just before the switch. Triangle: peak. Circle: back at that level with the "
                f"quantization fully on. Bold: moving average over {WINDOW} logged values.",
                title=f"Switch {number}",
            )
        yield "</div>"
    yield "<h2>Along the way</h2>"
    yield '<p class="note">Where a curve is noisy, faint is every logged value and bold its moving average.</p>'
    yield '<div class="grid">'
    for panel in PANELS:
        if any(panel.key in history.series for history in histories):
            name = panel.key.split("/")[1].replace("_", "-")
            yield _figure(to_svg(panel_figure(panel, histories), name, panel.title), title=panel.title)
    yield "</div>"
    samples = [(label, s) for label, s in zip(labels, summaries, strict=True) if s.sample_completion is not None]
    if samples:
        yield '<h2>Sample</h2>\n<p class="note">Bold: the prompt. The rest was written by the model.</p>'
    for label, summary in samples:
        yield f'<p class="note">{escape(label)}</p>' if len(summaries) > 1 else ""
        prompt, completion = escape(summary.sample_prompt or ""), escape(summary.sample_completion or "")
        yield f'<pre class="sample"><b>{prompt}</b>{completion}</pre>'
    yield "<h2>Configuration</h2>"
    for label, summary in zip(labels, summaries, strict=True):
        yield f"<details><summary>{escape(label)}</summary><pre>{escape(summary.config_text)}</pre></details>"


def _verdict_paragraphs(summaries: Sequence[RunSummary], labels: Sequence[str]) -> Iterator[str]:
    for label, summary in zip(labels, summaries, strict=True):
        lead = f"<strong>{escape(label)}.</strong> " if len(summaries) > 1 else ""
        yield f'<p class="verdict">{lead}{escape(verdict(summary))}</p>'
    finals = [
        (summary.phases[-1].validation_bits_per_byte, label)
        for label, summary in zip(labels, summaries, strict=True)
        if summary.is_complete and summary.phases[-1].validation_bits_per_byte is not None
    ]
    if len(finals) > 1:
        best, label = min(finals)
        yield f"<p>Of the complete runs, {escape(label)} ends lowest, at {best:.3f} bits per byte.</p>"


def _fact_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the first table: a fact and its value for each run."""

    def parameters(s: RunSummary) -> str | None:
        if s.num_parameters is None or s.num_ternary_parameters is None:
            return _count(s.num_parameters)
        share = s.num_ternary_parameters / s.num_parameters
        total, ternary = human_count(s.num_parameters), human_count(s.num_ternary_parameters)
        return f"{total}, of which {ternary} ternary ({share:.0%})"

    facts: dict[str, Callable[[RunSummary], str | None]] = {
        "Status": lambda s: "complete" if s.is_complete else "unfinished (running or interrupted)",
        "Parameters": parameters,
        "Steps": lambda s: f"{s.step:,}" + (f" of {s.planned_steps:,}" if s.planned_steps else ""),
        "Tokens": lambda s: human_count(s.tokens),
        "Throughput, ternary / 16-bit": lambda s: None if s.throughput_ratio is None else f"{s.throughput_ratio:.3g}",
        "Engine": lambda s: s.engine,
        "Ranks": lambda s: _count(s.num_ranks),
        "Wall time": lambda s: None if s.elapsed_seconds is None else duration(s.elapsed_seconds),
        "Skipped steps": lambda s: _count(s.skipped_steps),
        "Seed": lambda s: None if s.seed is None else str(s.seed),
        "Tritrain": lambda s: s.tritrain_version,
    }
    for fact, value in facts.items():
        yield fact, *(value(summary) or MISSING for summary in summaries)


_PHASE_COLUMNS = (
    "Phase",
    "Steps",
    "Tokens",
    "Training loss, nats/token",
    "Validation, bits/byte",
    "Tokens/s, median",
    "MFU, median",
)


def _phase_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    for number, summary in enumerate(summaries, start=1):
        for phase in summary.phases:
            share = phase.model_flops_utilization
            yield (
                (f"run {number}, " if len(summaries) > 1 else "") + f"phase {phase.index + 1}: {phase.precision}",
                f"{phase.steps:,}" + (f" of {phase.planned_steps:,}" if phase.planned_steps else ""),
                human_count(phase.tokens),
                _decimal(phase.train_loss),
                _decimal(phase.validation_bits_per_byte),
                MISSING if phase.tokens_per_second is None else human_count(phase.tokens_per_second),
                MISSING if share is None else f"{share:.1%}",
            )


_TRANSITION_FACTS = (
    "",
    "At step",
    "Training loss before, nats/token",
    "Noise of one logged loss, nats/token",
    "Highest loss above it, nats/token",
    "Back at the loss before, after",
    "Validation before, bits/byte",
    "Validation right after, bits/byte",
)


def _transition_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the transitions' table, its header first: a fact and its value for each transition."""

    def steps(count: int) -> str:
        return f"{count:,} step{'' if count == 1 else 's'}"

    columns: list[tuple[str, ...]] = [_TRANSITION_FACTS]
    for number, summary in enumerate(summaries, start=1):
        sides = {after.index: (before, after) for before, after in pairwise(summary.phases)}
        for transition in summary.transitions:
            before, after = sides[transition.to_phase]
            back = "not yet"
            if transition.recovery_steps is not None and transition.recovery_tokens is not None:
                back = f"{steps(transition.recovery_steps)} ({human_count(transition.recovery_tokens)} tokens)"
            columns.append(
                (
                    (f"run {number}, " if len(summaries) > 1 else "") + f"to {transition.to_precision}",
                    f"{transition.step:,} ({human_count(transition.tokens)} tokens)",
                    _decimal(transition.loss_before),
                    f"±{transition.noise:.2g}",
                    f"{_signed(transition.spike, 3)} after {steps(transition.peak_steps)}",
                    back,
                    _decimal(before.validation_bits_per_byte),
                    _decimal(after.validation_bits_per_byte_at_start),
                )
            )
    yield from zip(*columns, strict=True)


def duration(seconds: float) -> str:
    """Write a time in its two largest units: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    for size, unit, part_size, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if round(seconds / part_size) * part_size >= size:
            count, rest = divmod(round(seconds / part_size) * part_size, size)
            return f"{count} {unit} {rest // part_size} {part}"
    return f"{seconds:.3g} s"


def _count(value: int | None) -> str | None:
    return None if value is None else human_count(value)


def _decimal(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table that scrolls sideways where it is wider than the page; every cell is plain text."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _figure(svg: str, caption: str = "", title: str = "", is_large: bool = False) -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    notes = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure{" class=large" if is_large else ""}>{heading}<div class="scroll">{svg}</div>{notes}</figure>'
