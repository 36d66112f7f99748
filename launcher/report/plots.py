"""Draw the figures of a report.

Long curves are thinned to the smallest and the largest value of each of a few hundred equal stretches, about one per
horizontal pixel, which looks the same as the whole curve and keeps every spike.

Figures take their colors from `THEME`. A PNG uses the light ones; in an SVG each becomes a CSS variable, which lets
the page that contains it choose light or dark.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.process.console import human_count
from launcher.report.history import AVERAGED, BITS_PER_BYTE, LOSS, History, Series, curves
from launcher.report.target import MADE_BY
from launcher.run.log_keys import PREFERENCE_LOSS, REWARD_ACCURACY, REWARD_MARGIN, TRAINED
from launcher.run.recovery import Transition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


THEME: Mapping[str, tuple[str, str]] = {  # name: (light, dark); the runs' colors are Okabe and Ito's, seen by everyone
    "ink": ("#1f2328", "#e6edf3"),
    "line": ("#d1d9e0", "#3d444d"),
    "shade": ("#818b98", "#9198a1"),
    "run-0": ("#0072b2", "#4aa8e8"),
    "run-1": ("#d55e00", "#ff8a4c"),
    "run-2": ("#009e73", "#2fc79b"),
    "run-3": ("#cc79a7", "#ea9fca"),
    "run-4": ("#e69f00", "#f5c04a"),
    "run-5": ("#56b4e9", "#a6defa"),
    # The dark part of plasma at equal distances: an order, seen by everyone.
    "order-0": ("#0d0887", "#9a96ff"),
    "order-1": ("#5302a3", "#b58cff"),
    "order-2": ("#8b0aa5", "#d383f0"),
    "order-3": ("#b83289", "#f07fc8"),
    "order-4": ("#db5c68", "#ff8f96"),
    "order-5": ("#f48849", "#ffab78"),
    "order-6": ("#e0a00e", "#ffd24d"),
    # Cividis at equal distances, seen alike by everyone.
    "heat-0": ("#00224e", "#00224e"),
    "heat-1": ("#123570", "#123570"),
    "heat-2": ("#3b496c", "#3b496c"),
    "heat-3": ("#575d6d", "#575d6d"),
    "heat-4": ("#707173", "#707173"),
    "heat-5": ("#8a8678", "#8a8678"),
    "heat-6": ("#a59c74", "#a59c74"),
    "heat-7": ("#c3b369", "#c3b369"),
    "heat-8": ("#e1cc55", "#e1cc55"),
    "heat-9": ("#fee838", "#fee838"),
}


INK, LINE, SHADE = (THEME[name][0] for name in ("ink", "line", "shade"))


RUN_COLOURS = tuple(light for name, (light, _) in THEME.items() if name.startswith("run-"))


ORDER_COLOURS = tuple(light for name, (light, _) in THEME.items() if name.startswith("order-"))


HEAT_COLOURS = tuple(light for name, (light, _) in THEME.items() if name.startswith("heat-"))


STRETCHES_PER_INCH = 36
"""Stretches of a noisy curve that a figure of this width shows apart."""


NUM_SHOWN = 24
"""Logged losses after a switch that are shown at least."""


RUN_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # a second round through the colors is dashed, a third dotted


RUN_MARKERS = "os^DvP"


RUN_NAME_CHARACTERS = 44  # longer names are cut in legends


def thin(values: NDArray[np.float64], num_stretches: int) -> NDArray[np.int64]:
    """Choose the indices of the first, the last and, of each of `num_stretches` stretches, the extreme values."""
    if len(values) <= 2 * num_stretches:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    edges = np.linspace(0, len(values), num_stretches + 1).astype(np.int64).tolist()
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    for start, stop in pairwise(edges):
        kept |= {start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())}
    return np.asarray(sorted(kept))


@dataclass(frozen=True)
class Panel:
    """One metric as a small figure: its name in metrics.jsonl, a title, its scale, and whether to draw its level."""

    key: str
    title: str
    scale: float = 1.0
    is_log: bool = False
    is_noisy: bool = False
    is_close: bool = False
    """Whether the axes fit the values in both directions, instead of beginning at 0 and marking the phases."""


RATE = Panel(TRAINED, "Learning rate")
PANELS = (
    RATE,
    Panel("quant/strength", "Quantization strength (0 off, 1 fully on)"),
    Panel("train/grad_norm", "Gradient norm before clipping (log scale)", is_log=True, is_noisy=True),
    Panel(f"train/{PREFERENCE_LOSS}", "Preference loss, nats a pair", is_noisy=True),
    Panel(f"train/{REWARD_MARGIN}", "Reward margin", is_noisy=True),
    Panel(f"train/{REWARD_ACCURACY}", "Pairs with a reward margin above 0, %", scale=100, is_noisy=True),
    Panel("throughput/tokens_per_second", "Throughput, tokens/s", is_noisy=True),
    Panel("throughput/model_flops_utilization", "Model FLOPs utilization, %", scale=100, is_noisy=True),
    Panel("data/wait_share", "Time spent waiting for data, %", scale=100, is_noisy=True),
    Panel("checkpoint/stall_share", "Time spent waiting for checkpoints, %", scale=100),
    Panel("memory/peak_gib", "Peak memory, GiB"),
)


FAR_APART = 10
"""Factor between the highest learning rates of phases beyond which one axis from 0 shows the lower ones as nothing."""


def panels_of(histories: Sequence[History]) -> tuple[Panel, ...]:
    """`PANELS`, with the learning rate on a log scale if it is of another order in some phase."""
    series = [history.series[RATE.key] for history in histories if RATE.key in history.series]
    peaks = [each.values[each.phases == phase].max() for each in series for phase in np.unique(each.phases)]
    if not peaks or max(peaks) <= FAR_APART * min(peaks):
        return PANELS
    return (replace(RATE, title="Learning rate (log scale)", is_log=True), *PANELS[1:])


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's settings while a figure is built and while it is written, for it makes ticks and texts in both."""
    from matplotlib import rc_context

    with (
        warnings.catch_warnings(),
        rc_context(
            {
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans"],
                "font.size": 9,
                "axes.edgecolor": LINE,
                "axes.grid": True,
                "axes.labelcolor": INK,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "svg.fonttype": "none",
                "svg.hashsalt": "tritrain",  # the same figure gives the same bytes
                "text.color": INK,
                "text.parse_math": False,  # a run's name may contain dollars
                "xtick.color": INK,
                "ytick.color": INK,
            }
        ),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script
        yield


@styled()
def loss_figure(histories: Sequence[History], title: str = "", *, width_inches: float = 9) -> "Figure":
    """Draw the training loss, logged and its level, over tokens; below it the validation points, in bits per byte."""
    validations, averages = ([history.series.get(key) for history in histories] for key in (BITS_PER_BYTE, AVERAGED))
    figure = figure_of(width_inches, 5.8 if any(validations) else 4.2)
    figure.suptitle(title, fontweight="bold")
    rows = (2.2, 1) if any(validations) else (1,)
    axes = figure.subplots(len(rows), 1, sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    legend: list[tuple[Line2D, str]] = []
    for index, history in enumerate(histories):
        if LOSS not in history.series:
            continue
        raw, line = _plot_noisy(axes[0], history, LOSS, index, "smoothed")
        names = ("every logged loss", "its level, by lines through nearby losses")
        legend += zip((raw, line), names, strict=True) if len(histories) == 1 else [(line, _label(index, history))]
    _fit(axes[0], [history.series.get(LOSS) for history in histories])
    axes[0].set_ylabel("training loss, nats/token")
    _mark_phases(axes[0], histories, with_labels=True)
    if legend:
        axes[0].legend(*zip(*legend, strict=True), loc="lower left", framealpha=0, ncols=1 + (len(legend) > 6))
    for index, series in enumerate(validations):
        if series is not None:
            style = _line_style(index) | {"lw": 1, "marker": RUN_MARKERS[index % len(RUN_MARKERS)], "ms": 4}
            _plot(axes[1], series.tokens, series.values, 300, f"validation-{index}", **style)
    for index, series in enumerate(averages):
        if series is not None:
            style = _line_style(index) | {"lw": 1, "ls": ":", "marker": "x", "ms": 4}
            _plot(axes[1], series.tokens, series.values, 300, f"validation-averaged-{index}", **style)
    if any(validations):
        axes[1].set_ylabel("validation, bits/byte")
        _fit(axes[1], [*validations, *averages])
        _mark_phases(axes[1], histories, mark="validation-")
    token_axis(axes[-1])
    return figure


@styled()
def transition_figure(histories: Sequence[History], transitions: Sequence[Transition | None]) -> "Figure":
    """Draw the training loss around one transition of each run (None: it has none) over the steps since the switch."""
    figure = figure_of(5.6, 3.3)
    axes = figure.subplots()
    pairs = [(index, h, t) for index, (h, t) in enumerate(zip(histories, transitions, strict=True)) if t is not None]
    reach = max(_zoom_steps(history, transition) for _, history, transition in pairs)
    for index, history, transition in pairs:
        style = _line_style(index)
        for curve in curves(history, LOSS):
            near, level_near = (
                (at >= transition.step - 0.4 * reach) & (at <= transition.step + reach)
                for at in (curve.steps, curve.level_steps)
            )
            if curve.phase not in (transition.to_phase - 1, transition.to_phase) or not near.any():
                continue
            side = "after" if curve.phase == transition.to_phase else "before"
            since, values = curve.steps[near] - transition.step, curve.values[near]
            level_since = curve.level_steps[level_near] - transition.step
            raw = style | {"lw": 0.8, "alpha": 0.55}
            _plot(axes, since, values, 300, f"raw-{side}-{index}", **raw)
            _plot(axes, level_since, curve.levels[level_near], 300, f"{side}-{index}", **style | {"lw": 1.8})
            if side == "after":
                until = math.inf if transition.recovery_steps is None else transition.recovery_steps
                is_in = since <= min(until, reach)
                top = np.maximum(values[is_in], transition.loss_before)
                kept = thin(top, 300)
                area = axes.fill_between(
                    since[is_in][kept], top[kept], transition.loss_before, color=style["color"], alpha=0.15, lw=0
                )
                area.set_gid(f"area-{index}")
        level = axes.axhline(transition.loss_before, color=style["color"], lw=0.9, ls=(0, (1, 2)))
        level.set_gid(f"level-{index}")
        if transition.is_beyond_noise:
            _plot(axes, [transition.peak_steps], [transition.peak_loss], 1, f"peak-{index}", **style | {"marker": "v"})
            if transition.recovery_steps is not None:
                mark = style | {"marker": "o", "markerfacecolor": "none", "ms": 7}
                _plot(axes, [transition.recovery_steps], [transition.loss_before], 1, f"recovery-{index}", **mark)
    axes.axvline(0, color=INK, lw=1, ls=(0, (4, 2))).set_gid("switch")
    axes.set_xlabel("steps since the switch")
    axes.set_ylabel("training loss, nats/token")
    return figure


@styled()
def panel_figure(panel: Panel, histories: Sequence[History]) -> "Figure":
    """Draw one metric of all runs over tokens, as a small figure."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = figure_of(5.6, 2.6)
    axes = figure.subplots()
    for index, history in enumerate(histories):
        if panel.key in history.series and panel.is_noisy:
            _plot_noisy(axes, history, panel.key, index, "run", panel.scale)
        elif panel.key in history.series:
            series = history.series[panel.key]
            _plot(axes, series.tokens, panel.scale * series.values, 300, f"run-{index}", **_line_style(index))
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axes.dataLim.y1 > 0 and not panel.is_close:
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    if not panel.is_close:
        _mark_phases(axes, histories)
    token_axis(axes)
    if panel.is_close and axes.dataLim.width:
        axes.set_xlim(axes.dataLim.x0, axes.dataLim.x1)
    if axes.dataLim.y0 == axes.dataLim.y1 == 0:
        axes.set_ylim(0, 1)
    return figure


@styled()
def to_svg(figure: "Figure", name: str, description: str) -> str:
    """Write a figure as an `<svg>` element for a page: ids begin with `name`, colors are CSS variables of `THEME`."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)

    def adapt(match: re.Match[str]) -> str:  # tags only: what stands between them is the reader's text
        tag = re.sub(r' xmlns(:\w+)?="[^"]*"| (?:width|height)="[\d.]+pt"', "", match[0])
        tag = re.sub(r' id="|(?:xlink:)?href="#|url\(#', lambda part: part[0].removeprefix("xlink:") + name + "-", tag)
        for variable, (light, _) in THEME.items():
            tag = tag.replace(light, f"var(--{variable})")
        return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), tag)

    svg = text.getvalue()
    svg = re.sub(r"<[^>]+>", adapt, svg[svg.index("<svg") :])
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


@styled()
def to_picture(figure: "Figure", kind: str) -> bytes:
    """A figure as a file on a white ground: `pdf`, or `png` of 160 dots per inch."""
    content = io.BytesIO()
    metadata = {"png": {"Software": MADE_BY}, "pdf": {"Creator": MADE_BY, "CreationDate": None}}[kind]
    figure.savefig(content, format=kind, dpi=160, facecolor="white", metadata=metadata)
    return content.getvalue()


def figure_of(width_inches: float, height_inches: float) -> "Figure":
    """Make an empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _plot(axes: "Axes", x: Any, y: Any, num_stretches: int, mark: str, **style: Any) -> "Line2D":
    """Draw a thinned curve under the id `mark`; a single point, which has no line, as a dot."""
    y = np.asarray(y, dtype=np.float64)
    kept = thin(y, num_stretches)
    dot = {"marker": "."} if len(kept) == 1 else {}
    (line,) = axes.plot(np.asarray(x)[kept], y[kept], **dot | style, gid=mark)
    return line


def _plot_noisy(
    axes: "Axes", history: History, key: str, index: int, mark: str, scale: float = 1.0
) -> tuple["Line2D", "Line2D"]:
    """Draw what was logged, faint, and its level, bold, which breaks off at every switch; returns one line of each."""
    style = _line_style(index)
    for number, curve in enumerate(curves(history, key)):
        name = f"{index}-{curve.phase}" if number else f"{index}"
        stretches = int(STRETCHES_PER_INCH * axes.bbox.width / axes.figure.dpi) // len(history.phases)
        raw = style | {"lw": 0.8, "alpha": 0.55}
        lines = (
            _plot(axes, curve.tokens, scale * curve.values, stretches, f"raw-{name}", **raw),
            _plot(axes, curve.level_tokens, scale * curve.levels, stretches, f"{mark}-{name}", **style | {"lw": 1.6}),
        )
    return lines


def _line_style(index: int) -> dict[str, Any]:
    turn = index // len(RUN_COLOURS) % len(RUN_DASHES)
    return {"color": RUN_COLOURS[index % len(RUN_COLOURS)], "ls": RUN_DASHES[turn], "lw": 1.2}


def _label(index: int, history: History) -> str:
    """Write a run's number and name, as in the tables; the number keeps a leading underscore from hiding the entry."""
    is_long = len(history.name) > RUN_NAME_CHARACTERS
    return f"{index + 1}: {history.name[: RUN_NAME_CHARACTERS - 1] + '…' if is_long else history.name}"


def token_axis(axes: "Axes") -> None:
    """Label an axis of tokens, from 0."""
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)


def _fit(axes: "Axes", curves: Iterable[Series | None]) -> None:
    """Let the first 2 % of the tokens, where the loss is several times larger, leave the axis at its top."""
    settled = [curve.values[curve.tokens >= 0.02 * curve.tokens[-1]] for curve in curves if curve is not None]
    values = np.concatenate([part[np.isfinite(part)] for part in settled] or [np.empty(0)])
    if values.size:
        margin = 0.08 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _mark_phases(axes: "Axes", histories: Sequence[History], with_labels: bool = False, mark: str = "") -> None:
    """Shade ternary phases and draw a line at every switch, once if all runs agree, else in each run's color."""
    is_shared = len({tuple(phase.first_tokens for phase in history.phases) for history in histories}) == 1
    end = max(history.phases[-1].last_tokens for history in histories)
    rows = count()
    for index, history in enumerate(histories[:1] if is_shared else histories):
        color = INK if is_shared else RUN_COLOURS[index % len(RUN_COLOURS)]
        for phase in history.phases:
            last_tokens = end if is_shared and phase is history.phases[-1] else phase.last_tokens
            if phase.precision == "ternary":
                span = axes.axvspan(phase.first_tokens, last_tokens, color=SHADE if is_shared else color, lw=0)
                span.set_alpha(0.15 if is_shared else 0.06)
                span.set_gid(f"{mark}ternary-{index}-{phase.index}")
            if phase is history.phases[0]:
                continue
            axes.axvline(phase.first_tokens, color=color, lw=1, ls=(0, (4, 2))).set_gid(
                f"{mark}switch-{index}-{phase.index}"
            )
            if with_labels:
                is_left = phase.first_tokens > 0.6 * end
                before = next(each for each in reversed(history.phases) if each.index < phase.index)
                changed = f"to {phase.precision}" if phase.precision != before.precision else f"phase {phase.index}"
                axes.annotate(
                    f"{'' if is_shared else f'{index + 1}: '}{changed} at step {phase.first_step:,}",
                    xy=(phase.first_tokens, 0.98 - 0.06 * next(rows)),
                    xycoords=("data", "axes fraction"),
                    xytext=(-4 if is_left else 4, 0),
                    textcoords="offset points",
                    ha="right" if is_left else "left",
                    va="top",
                    color=color,
                )


def _zoom_steps(history: History, transition: Transition) -> int:
    """Choose how many steps after the switch to show: past the recovery, or all there are if there is none yet."""
    steps = history.series[LOSS].of_phase(transition.to_phase).steps
    if transition.recovery_steps is None:
        return int(steps[-1]) - transition.step
    interval = max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1
    return max(int(1.6 * transition.recovery_steps), 2 * transition.peak_steps, NUM_SHOWN * interval)
