"""Lay out the HTML report and the picture of runs.

The report puts one or several runs on a single page that loads nothing from anywhere; the picture is of their loss
curves. Both work on a run that is still going or was interrupted. The numbers are those of `launcher.report.summary`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

from data.new_paths import replace_file
from data.urls import redacted
from launcher.process.console import human_count
from launcher.report.elements import MISSING, html_figure, html_page, html_table
from launcher.report.history import AVERAGED, History
from launcher.report.plots import (
    Panel,
    loss_figure,
    panel_figure,
    panels_of,
    to_picture,
    to_svg,
    transition_figure,
)
from launcher.report.quant_plots import HEAT_MAP_NOTE, HEAT_MAPS, QUANT_PANELS, heat_map_figure
from launcher.report.summary import (
    COMPARED,
    PhaseSummary,
    RunSummary,
    duration,
    percent,
    recovery_text,
    samples_by_prompt,
    signed,
    spike_text,
    summarize,
    verdict,
)
from launcher.report.target import check_target
from launcher.report.twin import Excess, excess_figure

PHONE_INCHES = 4.4
"""Width of the loss figure where it is drawn for a phone."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML page about one or several runs.

    Raises:
        ConfigError: the file may not be written.
        LogError, OSError: a run cannot be read.
    """
    check_target(out)
    replace_file(Path(os.path.realpath(out)), page_of([summarize(run) for run in runs]).encode(errors="replace"))


def write_picture(run: Path, out: Path) -> None:
    """Write the loss curve of one run, with its switches and validation points, as a PNG or PDF.

    Raises:
        ConfigError, LogError, OSError: as `write_report`.
    """
    check_target(out)
    replace_file(Path(os.path.realpath(out)), picture_of([summarize(run)], out.suffix))


def picture_of(summaries: Sequence[RunSummary], suffix: str) -> bytes:
    """The loss curves as the content of a file with this suffix: `.png` or `.pdf`."""
    title = summaries[0].name if len(summaries) == 1 else ""
    return to_picture(loss_figure([summary.history for summary in summaries], title=title), suffix[1:])


def page_of(summaries: Sequence[RunSummary], excess: Excess | None = None) -> str:
    """The HTML page about one or several runs, and about what one has lost against its 16-bit twin."""
    labels = [s.name if len(summaries) == 1 else f"{i}: {s.name}" for i, s in enumerate(summaries, start=1)]
    names = ", ".join(summary.name for summary in summaries)
    return html_page(
        names if len(summaries) == 1 else f"{len(summaries)} runs: {names}",
        _verdict_paragraphs(summaries, labels),
        _body(summaries, labels, excess),
    )


def _body(summaries: Sequence[RunSummary], labels: Sequence[str], excess: Excess | None) -> Iterator[str]:
    """Yield the page's parts from top to bottom."""
    histories = [summary.history for summary in summaries]
    yield "<h2>In numbers</h2>"
    yield html_table(("", *labels), _fact_rows(summaries))
    yield "<h2>Phases</h2>"
    yield html_table(*_phases(summaries))
    if any(len(summary.phases) > 1 for summary in summaries):
        yield f'<p class="note">{COMPARED}</p>'
    if any(phase.tokens_by_source for summary in summaries for phase in summary.phases):
        yield "<h2>Data</h2>"
        yield html_table(("Phase", "Source", "Tokens drawn", "Share"), _source_rows(summaries))
    yield "<h2>Loss</h2>"
    caption = (
        "Faint: every logged training loss. Bold: its level, by least-squares lines through nearby losses of the same "
        "phase. The axis fits what comes after the first 2 % of the tokens. Shaded: ternary phases. Points: "
        "validation; at a switch, before it, and right after it at full strength."
    )
    if any(AVERAGED in history.series for history in histories):
        caption += " Dotted, with crosses: validation of the averaged weights."
    alternatives = [
        f'<div class="{width}">{to_svg(figure, name, "training and validation loss over tokens")}</div>'
        for width, name, figure in (
            ("wide", "loss", loss_figure(histories)),
            ("narrow", "loss-narrow", loss_figure(histories, width_inches=PHONE_INCHES)),
        )
    ]
    yield html_figure("".join(alternatives), caption)
    transitions = [summary.transitions for summary in summaries]
    if any(transitions):
        yield "<h2>Transitions</h2>"
        header, *rows = _transition_rows(summaries)
        yield html_table(header, rows)
        yield '<div class="grid">'
        for number, group in enumerate(zip_longest(*transitions), start=1):
            svg = to_svg(transition_figure(histories, group), f"transition-{number}", f"loss around switch {number}")
            yield html_figure(
                svg,
                "Faint: every logged loss. Bold: its level. Dotted: the level right before the switch. Shaded: the "
                "area above it. If there is a spike beyond the noise: triangle, its peak; circle, back at the dotted "
                "level with the quantization fully on.",
                title=f"Switch {number}",
            )
        yield "</div>"
    if excess is not None:
        yield from _twin(excess)
    yield "<h2>Along the way</h2>"
    yield '<p class="note">Where a curve is noisy, faint is every logged value and bold its level.</p>'
    yield from _panels(panels_of(histories), histories)
    if any(history.grids for history in histories):
        yield "<h2>Quantization</h2>"
        yield (
            '<p class="note">Over all quantized layers, each counting by its weights. What a figure is, and what is '
            "healthy, is on the documentation&#8217;s page on telemetry.</p>"
        )
        yield from _panels(QUANT_PANELS, histories)
        yield from _heat_maps(summaries, labels)
    samples = [(label, samples_by_prompt(s)) for label, s in zip(labels, summaries, strict=True) if s.samples]
    if samples:
        yield '<h2>Samples</h2>\n<p class="note">Bold: the prompt. The rest was written by the model.</p>'
    for label, by_prompt in samples:
        yield f'<p class="note">{escape(label)}</p>' if len(summaries) > 1 else ""
        for prompt, by_place in by_prompt.items():
            yield '<div class="samples">'
            for where, completion in by_place.items():
                text = f'<pre class="sample"><b>{escape(prompt)}</b>{escape(completion)}</pre>'
                yield f"<figure><figcaption>{escape(where)}</figcaption>{text}</figure>"
            yield "</div>"
    yield "<h2>Configuration</h2>"
    for label, summary in zip(labels, summaries, strict=True):
        yield f"<details><summary>{escape(label)}</summary><pre>{escape(redacted(summary.config_text))}</pre></details>"


def _twin(excess: Excess) -> Iterator[str]:
    """Yield what a run has lost against its 16-bit twin."""
    yield f"<h2>Above the 16-bit twin, {escape(excess.twin)}</h2>"
    facts = (
        ("Peak, nats/token", signed(excess.peak, 4)),
        ("Area, nats", human_count(excess.area)),
        ("Held-out loss at the end, nats/token", MISSING if excess.at_end is None else signed(excess.at_end, 4)),
    )
    yield html_table(("At equal tokens", ""), facts)
    what = "Logged losses on the same batches" if excess.same_batches else "Levels of the losses, as batches differ"
    before = f" {human_count(excess.offset_tokens)} tokens came before this run." if excess.offset_tokens else ""
    figure = excess_figure(excess)
    yield html_figure(to_svg(figure, "twin", "training loss above the 16-bit twin"), f"{what}, subtracted.{before}")


def _panels(panels: Iterable[Panel], histories: Sequence[History]) -> Iterator[str]:
    """Yield a grid of small figures, those of which any run has values."""
    yield '<div class="grid">'
    for panel in panels:
        if any(panel.key in history.series for history in histories):
            name = panel.key.replace("/", "-").replace("_", "-")
            yield html_figure(to_svg(panel_figure(panel, histories), name, panel.title), title=panel.title)
    yield "</div>"


def _heat_maps(summaries: Sequence[RunSummary], labels: Sequence[str]) -> Iterator[str]:
    """Yield the maps of layers over the steps of each run's last ternary phase."""
    for number, (summary, label) in enumerate(zip(summaries, labels, strict=True)):
        for grid in summary.history.grids[-1:]:
            yield f"<h3>Layers{f', {escape(label)}' if len(summaries) > 1 else ''}</h3>"
            yield f'<p class="note">{HEAT_MAP_NOTE}</p>\n<div class="grid">'
            for heat_map in HEAT_MAPS:
                if heat_map.key in grid.values:
                    name = f"layers-{number}-{heat_map.key.replace('_', '-')}"
                    yield html_figure(
                        to_svg(heat_map_figure(heat_map, grid), name, heat_map.title), title=heat_map.title
                    )
            yield "</div>"


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
        "Ranks": lambda s: s.num_ranks,
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


def _phases(summaries: Sequence[RunSummary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of phases, with a column of averaged weights if any run has them."""
    averaged = [phase.averaged_bits_per_byte for summary in summaries for phase in summary.phases]
    rows = list(_phase_rows(summaries))
    if not any(averaged):
        return _PHASE_COLUMNS, rows
    added = [(*row[:5], _decimal(value), *row[5:]) for row, value in zip(rows, averaged, strict=True)]
    return (*_PHASE_COLUMNS[:5], "Of averaged weights, bits/byte", *_PHASE_COLUMNS[5:]), added


def _phase_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    for number, summary in enumerate(summaries, start=1):
        for phase in summary.phases:
            share = phase.model_flops_utilization
            yield (
                _phase_name(number, summaries, phase),
                f"{phase.steps:,}" + (f" of {phase.planned_steps:,}" if phase.planned_steps else ""),
                human_count(phase.tokens),
                _decimal(phase.train_loss),
                _decimal(phase.validation_bits_per_byte),
                MISSING if phase.tokens_per_second is None else human_count(phase.tokens_per_second),
                MISSING if share is None else f"{share:.1%}",
            )


def _source_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of sources: what each phase has drawn from each."""
    for number, summary in enumerate(summaries, start=1):
        for phase in summary.phases:
            for path, tokens in phase.tokens_by_source.items():
                share = tokens / sum(phase.tokens_by_source.values())
                yield _phase_name(number, summaries, phase), redacted(path), human_count(tokens), f"{share:.1%}"


def _phase_name(number: int, summaries: Sequence[RunSummary], phase: PhaseSummary) -> str:
    """A phase as the page calls it: with its run, if there are several."""
    return (f"run {number}, " if len(summaries) > 1 else "") + f"phase {phase.index}: {phase.precision}"


_TRANSITION_FACTS = (
    "",
    "At step",
    "Validation right before, bits/byte",
    "Validation right after, bits/byte",
    "Training loss before, nats/token",
    "Highest level above it, nats/token",
    "Back at the loss before, after",
    "Area above it until then, nats",
)


def _transition_rows(summaries: Sequence[RunSummary]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the transitions' table, its header first: a fact and its value for each transition."""
    columns: list[tuple[str, ...]] = [_TRANSITION_FACTS]
    for number, summary in enumerate(summaries, start=1):
        for transition in summary.transitions:
            before, after = transition.bits_per_byte_before, transition.bits_per_byte_after
            change = f" ({percent(after, before)})" if before and after else ""
            is_spike = transition.is_beyond_noise
            columns.append(
                (
                    (f"run {number}, " if len(summaries) > 1 else "") + f"to {transition.to_precision}",
                    f"{transition.step:,} ({human_count(transition.tokens)} tokens)",
                    _decimal(before),
                    _decimal(after) + change,
                    _decimal(transition.loss_before),
                    spike_text(transition),
                    recovery_text(transition) if is_spike else MISSING,
                    human_count(transition.area) if is_spike else MISSING,
                )
            )
    yield from zip(*columns, strict=True)


def _count(value: int | None) -> str | None:
    return None if value is None else human_count(value)


def _decimal(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
