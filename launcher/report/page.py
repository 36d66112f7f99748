"""Write the HTML report and the picture of runs.

`write_report` puts one or several runs on a single HTML page that loads nothing from anywhere; `write_picture` draws
the loss curve as a PNG. Both work on a run that is still going or was interrupted. The numbers are those of
`launcher.report.summary`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise, zip_longest
from pathlib import Path
from string import Template

from data.messages import printable
from data.urls import redacted
from launcher.process.console import human_count
from launcher.report.history import LOSS, History
from launcher.report.plots import (
    PANELS,
    THEME,
    Panel,
    loss_figure,
    overview_window,
    panel_figure,
    save_png,
    to_svg,
    transition_figure,
)
from launcher.report.quant_plots import HEAT_MAP_NOTE, HEAT_MAPS, QUANT_PANELS, heat_map_figure
from launcher.report.summary import RunSummary, duration, signed, summarize, verdict
from launcher.run.recovery import WINDOW

MISSING = "\N{EM DASH}"


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
    out.write_text(printable(page), encoding="utf-8")


def write_picture(run: Path, out: Path) -> None:
    """Write the loss curve of one run, with its switches and validation points, as a PNG."""
    summary = summarize(run)
    save_png(loss_figure([summary.history], title=summary.name), out)


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
        "(bias-corrected, starting over in every phase). The axis fits what comes after the first 2 % of the tokens. "
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
                "Dotted: the smoothed loss just before the switch. Shaded: the area above it. Triangle: peak. Circle: "
                f"back at that level with the quantization fully on. Bold: moving average over {WINDOW} logged values.",
                title=f"Switch {number}",
            )
        yield "</div>"
    yield "<h2>Along the way</h2>"
    yield '<p class="note">Where a curve is noisy, faint is every logged value and bold its moving average.</p>'
    yield from _panels(PANELS, histories)
    if any(history.grids for history in histories):
        yield "<h2>Quantization</h2>"
        yield (
            '<p class="note">Over all quantized layers, each counting by its weights. What a figure is, and what is '
            "healthy, is on the documentation&#8217;s page on telemetry.</p>"
        )
        yield from _panels(QUANT_PANELS, histories)
        yield from _heat_maps(summaries, labels)
    samples = [(label, s) for label, s in zip(labels, summaries, strict=True) if s.sample_completion is not None]
    if samples:
        yield '<h2>Sample</h2>\n<p class="note">Bold: the prompt. The rest was written by the model.</p>'
    for label, summary in samples:
        yield f'<p class="note">{escape(label)}</p>' if len(summaries) > 1 else ""
        prompt, completion = escape(summary.sample_prompt or ""), escape(summary.sample_completion or "")
        yield f'<pre class="sample"><b>{prompt}</b>{completion}</pre>'
    yield "<h2>Configuration</h2>"
    for label, summary in zip(labels, summaries, strict=True):
        yield f"<details><summary>{escape(label)}</summary><pre>{escape(redacted(summary.config_text))}</pre></details>"


def _panels(panels: Iterable[Panel], histories: Sequence[History]) -> Iterator[str]:
    """Yield a grid of small figures, those of which any run has values."""
    yield '<div class="grid">'
    for panel in panels:
        if any(panel.key in history.series for history in histories):
            name = panel.key.replace("/", "-").replace("_", "-")
            yield _figure(to_svg(panel_figure(panel, histories), name, panel.title), title=panel.title)
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
                    yield _figure(to_svg(heat_map_figure(heat_map, grid), name, heat_map.title), title=heat_map.title)
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
                (f"run {number}, " if len(summaries) > 1 else "") + f"phase {phase.index}: {phase.precision}",
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
    "Area above it until then, nats",
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
                    f"{signed(transition.spike, 3)} after {steps(transition.peak_steps)}",
                    back,
                    human_count(transition.area),
                    _decimal(before.validation_bits_per_byte),
                    _decimal(after.validation_bits_per_byte_at_start),
                )
            )
    yield from zip(*columns, strict=True)


def _count(value: int | None) -> str | None:
    return None if value is None else human_count(value)


def _decimal(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


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
