"""The figures of a study's report.

Colors: the switch points of the curves run from dark to bright; lines of the other figures have the colors of runs, one
for each combination of the other axes. Baselines are black and gray.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.process.console import human_count
from launcher.report.plots import (
    INK,
    ORDER_COLOURS,
    RUN_COLOURS,
    RUN_DASHES,
    RUN_MARKERS,
    SHADE,
    figure_of,
    styled,
    token_axis,
)
from launcher.study.analysis import (
    SCRATCH,
    SIXTEEN,
    Group,
    against_best,
    best_of,
    dense_of,
    gaps_of,
    scratches_of,
)
from launcher.study.config import NO_BASELINE, POST_TRAINING
from launcher.study.curves import Curve, excess_curve, loss_curve, mean_curve, reference_of, switch_tokens
from launcher.study.intervals import Estimate, paired
from launcher.study.reading import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Line = tuple[tuple[str, str], ...]

PANELS_PER_ROW = 3

BASELINE_STYLES: Mapping[str, dict[str, Any]] = {
    SIXTEEN: {"color": INK, "ls": "-"},
    SCRATCH: {"color": SHADE, "ls": "-"},
    POST_TRAINING: {"color": SHADE, "ls": (0, (1, 1.5))},
}

SETTLED = 0.12
"""Share of a run after which the losses decide what an axis shows."""

BAND_ALPHA, MOST_BANDS, PAIRED_PANEL = 0.08, 3, 2
"""Of baselines' intervals. Many of absolute losses would cover each other, since all share the spread between seeds."""

BASELINE_DASHES = (*RUN_DASHES, (0, (6, 1.5, 1, 1.5)), (0, (2, 2)))

LARGEST_SHARE = 1.6
"""Of the gap that a figure shows, in either direction from its middle."""


def arms_of(groups: Sequence[Group]) -> list[Group]:
    """The arms of the grid."""
    return [group for group in groups if group.baseline == NO_BASELINE]


def lines_of(groups: Sequence[Group]) -> list[Line]:
    """The combinations of the other axes than the switch point."""
    return list(dict.fromkeys(group.line for group in arms_of(groups)))


def has_switch_axis(groups: Sequence[Group]) -> bool:
    """Whether the arms of any line switch at several points."""
    places = {(group.line, group.switch_share) for group in arms_of(groups) if group.switch_share is not None}
    return len(places) > len({line for line, _ in places})


def line_name(line: Line) -> str:
    """What a line is called."""
    return ", ".join(f"{axis} {value}" for axis, value in line) or "arms"


@styled()
def loss_figure(findings: Findings, groups: Sequence[Group]) -> "Figure":
    """Training loss against tokens: a panel for each line, above the losses, below what is above the 16-bit twin."""
    lines: list[Line] = lines_of(groups) or [()]
    columns = 2 if len(lines) == 4 else min(PANELS_PER_ROW, len(lines))
    blocks = math.ceil(len(lines) / columns)
    figure = figure_of(max(5.6, 3.5 * columns), 4.6 * blocks + 0.5)
    grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False, height_ratios=[1.35, 1] * blocks)
    shares = sorted({share for group in arms_of(groups) if (share := group.switch_share) is not None})
    colors = {
        share: ORDER_COLOURS[round(place * (len(ORDER_COLOURS) - 1) / max(1, len(shares) - 1))]
        for place, share in enumerate(shares)
    }
    legend: dict[str, Any] = {}
    shown: list[tuple[list[Curve], list[Curve]]] = []
    for index, line in enumerate(lines):
        above, below = (grid[2 * (index // columns) + part, index % columns] for part in (0, 1))
        drawn: tuple[list[Curve], list[Curve]] = ([], [])
        shown.append(drawn)
        arms = [group for group in arms_of(groups) if group.line == line]
        below.axhline(0, color=INK, lw=0.8)
        for group in [*_baselines_of(arms, groups), *arms]:
            style, name = _curve_style(group, arms, groups, colors)
            losses = {record.name: loss_curve(record) for record in group.members}
            references = {record.name: reference_of(record, group, groups, findings) for record in group.members}
            excesses = {
                record.name: excess_curve(record, reference)
                for record in group.members
                if group.baseline != SIXTEEN and (reference := references[record.name]) is not None
            }
            for part, (axes, curves, mark) in enumerate(((above, losses, "arm"), (below, excesses, "excess"))):
                drawn[part].extend(curves.values())
                handle = _draw_seeds(axes, curves, style, f"{mark}-{index}")
                if handle is not None:
                    legend.setdefault(name, handle)
            _mark_switch(above, below, group, style)
        above.set_title(line_name(line) if line else "", fontsize=9)
        for axes, label in ((above, "training loss, nats/token"), (below, "above its 16-bit twin")):
            if index % columns == 0:
                axes.set_ylabel(label)
        token_axis(below)
        below.tick_params(labelbottom=True)
    for index in range(len(lines), blocks * columns):
        for part in (0, 1):
            grid[2 * (index // columns) + part, index % columns].set_axis_off()
    for part, axes_of_part in enumerate((grid[0::2].flat, grid[1::2].flat)):
        _fit([curve for drawn in shown for curve in drawn[part]], axes_of_part, spikes=part == 1)
    _legend(figure, legend)
    return figure


def _baselines_of(arms: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The baselines with which arms are drawn: of several from scratch or after training, all."""
    wanted: dict[int, Group] = {}
    for group in arms or [each for each in groups if each.baseline == SIXTEEN][:1]:
        for each in (dense_of(group, groups), *scratches_of(group, groups)):
            if each is not None:
                wanted[id(each)] = each
    if not arms:
        wanted |= {id(each): each for each in groups}
    return sorted(wanted.values(), key=lambda each: each.baseline != SCRATCH)


def _curve_style(
    group: Group, arms: Sequence[Group], groups: Sequence[Group], colors: Mapping[float, str]
) -> tuple[dict[str, Any], str]:
    if group.baseline != NO_BASELINE:
        style = BASELINE_STYLES[group.baseline]
        same = [each for each in _baselines_of(arms, groups) if each.baseline == group.baseline]
        if group.baseline == SCRATCH and len(same) > 1:
            best = min(same, key=lambda each: np.mean(list(each.losses.values())))
            return (style, "scratch, the best") if group is best else (style | {"ls": (0, (4, 2))}, "scratch, others")
        return style, group.baseline
    share = group.switch_share
    if share is None:
        return {"color": RUN_COLOURS[0]}, "arms"
    return {"color": colors[share]}, f"switch at {share:.3g} %"


def _draw_seeds(axes: "Axes", curves: Mapping[str, Curve], style: Mapping[str, Any], mark: str) -> "Line2D | None":
    """Draw the curve of each seed, faint, and their mean; returns the bold line."""
    curves = {name: curve for name, curve in curves.items() if len(curve.values)}
    bold = None
    for name, curve in curves.items():
        width, alpha = (0.6, 0.3) if len(curves) > 1 else (1.3, 1.0)
        (bold,) = axes.plot(curve.tokens, curve.values, **style, lw=width, alpha=alpha, gid=f"{mark}-{name}")
    if len(curves) > 1:
        mean = mean_curve(list(curves.values()))
        (bold,) = axes.plot(mean.tokens, mean.values, **style, lw=1.3, gid=f"mean-{mark}-{next(iter(curves))}")
    return bold


def _mark_switch(above: "Axes", below: "Axes", group: Group, style: Mapping[str, Any]) -> None:
    """Mark the switch of an arm."""
    tokens = next((at for record in group.members if (at := switch_tokens(record)) is not None), None)
    if tokens is not None:
        dot = {"marker": "o", "ms": 4, "color": style["color"], "ls": "", "zorder": 4}
        below.plot([tokens], [0], **dot, clip_on=False, gid=f"switch-{group.members[0].name}")
        above.axvline(tokens, color=style["color"], lw=0.7, ls=(0, (1, 2)))


def _fit(curves: Sequence[Curve], all_axes: Iterable["Axes"], *, spikes: bool) -> None:
    """Show what comes after the first part of the run; short spikes leave the axis at its top."""
    settled = [curve.values[curve.tokens >= SETTLED * curve.tokens[-1]] for curve in curves if len(curve.tokens)]
    values = np.concatenate(settled or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = float(values.min()), float(np.quantile(values, 0.98 if spikes else 0.995))
    if spikes:
        low, high = min(low, 0.0), 1.25 * max(high, 0.0)
    margin = 0.06 * (high - low) or 0.1
    for axes in all_axes:
        axes.set_ylim(low - margin, high + margin)


@styled()
def switch_figure(groups: Sequence[Group]) -> "Figure":
    """Held-out loss at the end against the switch point, absolute and against the 16-bit baseline of the same seed."""
    scored = sorted({task for group in arms_of(groups) for each in group.members for task in each.scores})
    panels: list[tuple[str, Callable[[Group], Estimate | None]]] = [
        ("held-out loss, nats/token", lambda group: group.mean("held_out_loss")),
        ("held-out loss, bits/byte", lambda group: group.mean("held_out_bits_per_byte")),
        ("above 16 bits, paired by seed, nats/token", lambda group: above_dense(group, groups)),
    ]
    if scored:
        panels.append((f"score, mean of {len(scored)} tasks", lambda group: mean_score(group, scored)))
    num_lines = len({(group.baseline, group.line) for group in groups})
    figure = figure_of(3.7 * len(panels), 4.0 + 0.1 * num_lines)
    legend: dict[str, Any] = {}
    for number, (axes, (label, value_of)) in enumerate(zip(figure.subplots(1, len(panels)), panels, strict=True)):
        _draw_baselines(axes, groups, value_of, legend, number)
        _draw_lines(axes, groups, value_of, legend, f"line-{number}")
        _fit_means(axes, groups, value_of)
        axes.set_ylabel(label)
        _switch_axis(axes)
    _legend(figure, legend)
    return figure


def _fit_means(axes: "Axes", groups: Sequence[Group], value_of: Callable[[Group], Estimate | None]) -> None:
    """Fit an axis to the means; intervals may leave it, and post-training does if it is far off, with a note."""
    means = {group: found.mean for group in groups if (found := value_of(group)) is not None}
    near = [mean for group, mean in means.items() if group.baseline != POST_TRAINING]
    if not near:
        return
    size = max(near) - min(near) or 0.1
    low, high = min(near) - 0.3 * size, max(near) + 0.3 * size
    far = sorted(mean for group, mean in means.items() if group.baseline == POST_TRAINING and mean > high)
    if far and far[-1] <= high + size:
        high, far = far[-1] + 0.15 * size, []
    axes.set_ylim(low, high)
    if far:
        text = f"post-training at {' and '.join(f'{mean:.3f}' for mean in far[:3])} \N{UPWARDS ARROW}"
        axes.annotate(text, (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=8)


def above_dense(group: Group, groups: Sequence[Group]) -> Estimate | None:
    """The held-out loss of an arm minus its 16-bit baseline's, paired by seed."""
    dense = dense_of(group, groups)
    return None if dense is None or dense is group else paired(group.losses, dense.losses)


def mean_score(group: Group, tasks: Sequence[str]) -> Estimate | None:
    """The mean score of these tasks over the seeds that have all of them."""
    from launcher.study.intervals import mean_of

    means = [
        sum(each.scores[task] for task in tasks) / len(tasks)
        for each in group.members
        if all(task in each.scores for task in tasks)
    ]
    return mean_of(means) if means else None


def _draw_lines(
    axes: "Axes",
    groups: Sequence[Group],
    value_of: Callable[[Group], Estimate | None],
    legend: dict[str, Any],
    mark: str,
) -> None:
    """Draw a line for each combination of the other axes; points are moved a little, so that intervals stay apart."""
    lines = lines_of(groups)
    for index, line in enumerate(lines):
        found = [
            (group.switch_share, value)
            for group in arms_of(groups)
            if group.line == line and group.switch_share is not None and (value := value_of(group)) is not None
        ]
        if not found:
            continue
        found.sort(key=lambda point: point[0] or 0.0)
        moved = 0.7 * (index - (len(lines) - 1) / 2)
        at = [(share or 0.0) + moved for share, _ in found]
        means = [value.mean for _, value in found]
        style = _line_style(index)
        for place, (_, value) in zip(at, found, strict=True):
            if value.low is not None and value.high is not None:
                axes.plot([place, place], [value.low, value.high], color=style["color"], lw=0.9, alpha=0.8)
        (handle,) = axes.plot(at, means, **style, lw=1.3, ms=4.5, gid=f"{mark}-{index}")
        legend.setdefault(line_name(line), handle)


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": RUN_COLOURS[index % len(RUN_COLOURS)],
        "ls": RUN_DASHES[index // len(RUN_COLOURS) % len(RUN_DASHES)],
        "marker": RUN_MARKERS[index % len(RUN_MARKERS)],
    }


def _draw_baselines(
    axes: "Axes",
    groups: Sequence[Group],
    value_of: Callable[[Group], Estimate | None],
    legend: dict[str, Any],
    panel: int,
) -> None:
    """Draw each baseline as a band, its interval, with its mean; one that has a switch point as a line of points."""
    number = count()
    has_bands = panel == PAIRED_PANEL or sum(group.baseline != NO_BASELINE for group in groups) <= MOST_BANDS
    for baseline in (SIXTEEN, SCRATCH, POST_TRAINING):
        own = [group for group in groups if group.baseline == baseline]
        lines = list(dict.fromkeys(group.line for group in own))
        for turn, line in enumerate(lines):
            style = BASELINE_STYLES[baseline] | ({"ls": BASELINE_DASHES[turn % len(BASELINE_DASHES)]} if turn else {})
            name = f"{baseline} ({line_name(line)})" if len(lines) > 1 else baseline
            members = [(group, value) for group in own if group.line == line and (value := value_of(group)) is not None]
            points = [
                (float(group.point["switch"].rstrip("%")), value) for group, value in members if "switch" in group.point
            ]
            gid = f"baseline-{panel}-{next(number)}"
            if points:
                at, means = [place for place, _ in points], [value.mean for _, value in points]
                (handle,) = axes.plot(at, means, lw=1, marker="x", ms=4, **style, gid=gid)
                legend.setdefault(name, handle)
                for place, value in points:
                    if value.low is not None and value.high is not None:
                        axes.plot([place, place], [value.low, value.high], lw=0.9, alpha=0.6, **style)
                continue
            for _, value in members:
                if has_bands and value.low is not None and value.high is not None:
                    axes.axhspan(value.low, value.high, color=style["color"], alpha=BAND_ALPHA, lw=0)
                legend.setdefault(name, axes.axhline(value.mean, lw=1.2, **style, gid=gid))


@styled()
def gap_figure(groups: Sequence[Group]) -> "Figure":
    """The share of the fair gap that each arm closes, with Fieller's interval, against the switch point."""

    def share(group: Group) -> Estimate | None:
        gaps = gaps_of(group, groups)
        found = gaps[0].share_of(group) if gaps else None
        if found is None:
            return None
        ends = [None if end is None else 100 * max(-10.0, min(10.0, end)) for end in (found.low, found.high)]
        return Estimate(mean=100 * found.mean, low=ends[0], high=ends[1], standard_error=None, num=found.num)

    figure = figure_of(8.0, 4.2)
    axes, legend = figure.subplots(), dict[str, Any]()
    _draw_lines(axes, groups, share, legend, "gap")
    means = [found.mean for group in arms_of(groups) if (found := share(group)) is not None]
    bottom, top = min([0.0, *means]), max([100.0, *means])
    axes.set_ylim(max(bottom - 25, 50 - 100 * LARGEST_SHARE * 2), min(top + 25, 50 + 100 * LARGEST_SHARE * 2))
    for level, style in ((0, BASELINE_STYLES[SCRATCH]), (100, BASELINE_STYLES[SIXTEEN])):
        axes.axhline(level, lw=1.2, **style)
    axes.set_ylabel("share of the fair gap closed, %")
    _switch_axis(axes)
    _legend(figure, legend)
    return figure


@styled()
def excess_figure(groups: Sequence[Group]) -> "Figure":
    """What the switch costs against the 16-bit twin at equal tokens: peak, area and end, against the switch point."""
    from matplotlib.ticker import FuncFormatter

    panels = (
        ("excess_peak", "peak, nats/token"),
        ("excess_area", "area, nats"),
        ("excess_at_end", "at the end, held-out nats/token"),
    )
    figure = figure_of(11.1, 3.6)
    legend: dict[str, Any] = {}
    for axes, (column, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.axhline(0, color=INK, lw=0.8)
        _draw_lines(axes, groups, partial(Group.mean, column=column), legend, column.replace("_", "-"))
        axes.set_ylabel(label)
        _switch_axis(axes)
        if column == "excess_area":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    _legend(figure, legend)
    return figure


@styled()
def arms_figure(groups: Sequence[Group]) -> "Figure":
    """Every arm and baseline, best first: its loss, a dot for each seed; and how far it is above the best arm."""
    best = best_of(groups)
    differences = {id(each.first): each.by_seed for each in against_best(groups)}
    complete = sorted(
        (group for group in groups if group.losses),
        key=lambda group: -(differences[id(group)].mean if id(group) in differences else 0.0),
    )
    figure = figure_of(9.0, 1.1 + 0.24 * len(complete))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, group in enumerate(complete):
        color = RUN_COLOURS[0] if group.baseline == NO_BASELINE else BASELINE_STYLES[group.baseline]["color"]
        losses = list(group.losses.values())
        left.plot(losses, [place] * len(losses), ".", color=color, alpha=0.5, ms=5, gid=f"seeds-{place}")
        left.plot([_mean(group)], [place], "D", color=color, ms=4)
        difference = differences.get(id(group))
        if group is best:
            right.plot([0], [place], "D", color=color, ms=4)
        elif difference is not None:
            is_noise = difference.is_within_noise is not False
            fill = {"markerfacecolor": "white" if is_noise else color}
            if difference.low is not None and difference.high is not None:
                right.plot([difference.low, difference.high], [place, place], color=color, lw=1)
            right.plot([difference.mean], [place], "D", color=color, ms=4, **fill, gid=f"difference-{place}")
    left.set_yticks(range(len(complete)), [group.name_with_seeds for group in complete])
    left.set_ylim(-0.7, len(complete) - 0.3)
    left.set_xlabel("held-out loss, nats/token")
    right.axvline(0, color=INK, lw=0.8)
    right.set_xlabel("above the best arm, nats/token")
    means = [each.mean for each in differences.values()]
    if means:
        reach = max(means) - min(0.0, *means) or 0.01
        right.set_xlim(min(0.0, *means) - 0.35 * reach, max(means) + 0.35 * reach)
    return figure


def _mean(group: Group) -> float:
    return float(np.mean(list(group.losses.values())))


def _switch_axis(axes: "Axes") -> None:
    axes.set_xlabel("switch, % of the run")
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))


def _legend(figure: "Figure", handles: Mapping[str, Any]) -> None:
    if handles:
        widest = max(map(len, handles))
        columns = max(1, min(len(handles), int(figure.get_size_inches()[0] * 12 / (widest + 8))))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
        )
