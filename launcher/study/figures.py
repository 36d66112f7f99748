"""The figures of a study's report.

Colors: the switch points of the curves run from dark to bright; lines of the other figures have the colors of runs, one
for each combination of the other axes. Baselines are black and gray.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.process.console import human_count
from launcher.report.plots import (
    INK,
    RUN_COLOURS,
    RUN_DASHES,
    RUN_MARKERS,
    SHADE,
    figure_of,
    styled,
)
from launcher.study.analysis import (
    SCRATCH,
    SIXTEEN,
    Group,
    against_best,
    best_of,
    dense_of,
    distances,
    gaps_of,
)
from launcher.study.config import NO_BASELINE, POST_TRAINING
from launcher.study.intervals import Estimate, mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = tuple[tuple[str, str], ...]

BASELINE_STYLES: Mapping[str, dict[str, Any]] = {
    SIXTEEN: {"color": INK, "ls": "-"},
    SCRATCH: {"color": SHADE, "ls": "-"},
    POST_TRAINING: {"color": SHADE, "ls": (0, (1, 1.5))},
}

BAND_ALPHA, MOST_BANDS, PAIRED_PANEL = 0.08, 3, 2
"""Of baselines' intervals. Many of absolute losses would cover each other, since all share the spread between seeds."""

BASELINE_DASHES = (*RUN_DASHES, (0, (6, 1.5, 1, 1.5)), (0, (2, 2)))

CHARACTERS_PER_INCH = 14
"""Of names beside an axis."""

LEGEND_ROW_INCHES = 0.18

MANY_AXES = 3
"""Axes of a line from which on a legend would repeat their names too often."""

MOST_MOVED = 3.0
"""Percent of a run by which a point is moved at most, so that intervals stay apart."""

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


def legend_name(line: Line) -> str:
    """What a line is called in a legend: of many axes its values alone, as `legend_of` names the axes above them."""
    return ", ".join(value for _, value in line) if len(line) >= MANY_AXES else line_name(line)


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
    figure = figure_of(3.7 * len(panels), 3.7)
    legend: dict[str, Any] = {}
    for number, (axes, (label, value_of)) in enumerate(zip(figure.subplots(1, len(panels)), panels, strict=True)):
        _draw_baselines(axes, groups, value_of, legend, number)
        _draw_lines(axes, groups, value_of, legend, f"line-{number}")
        _fit_means(axes, groups, value_of)
        axes.set_ylabel(label)
        _switch_axis(axes)
    legend_of(figure, legend, lines_of(groups))
    return figure


def _fit_means(axes: "Axes", groups: Sequence[Group], value_of: Callable[[Group], Estimate | None]) -> None:
    """Fit an axis to the means, and to an interval of middle length, so that noise looks like noise.

    Longer intervals may leave it, and post-training does if it is far off, with a note.
    """
    values = {group: found for group in groups if (found := value_of(group)) is not None}
    means = {group: found.mean for group, found in values.items()}
    near = [mean for group, mean in means.items() if group.baseline != POST_TRAINING]
    if not near:
        return
    lengths = [(found.high or 0.0) - (found.low or 0.0) for found in values.values() if found.has_interval]
    middle, spread = (max(near) + min(near)) / 2, max(near) - min(near)
    size = max(1.6 * spread, 1.2 * float(np.median(lengths)) if lengths else 0.0) or 0.16
    low, high = middle - size / 2, middle + size / 2
    far = sorted(mean for group, mean in means.items() if group.baseline == POST_TRAINING and mean > high)
    if far and far[-1] <= high + size:
        high, far = far[-1] + 0.15 * size, []
    axes.set_ylim(low, high)
    if far:
        text = f"post-training at {' and '.join(f'{mean:.3f}' for mean in far[:3])} \N{UPWARDS ARROW}"
        axes.annotate(text, (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=8)


def above_dense(group: Group, groups: Sequence[Group]) -> Estimate | None:
    """The held-out loss of an arm minus its 16-bit baseline's, paired by seed."""
    values = [*distances(group, groups).values()]
    return mean_of(values) if values and dense_of(group, groups) is not group else None


def mean_score(group: Group, tasks: Sequence[str]) -> Estimate | None:
    """The mean score of these tasks over the seeds that have all of them."""
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
    step = min(0.7, 2 * MOST_MOVED / len(lines))
    for index, line in enumerate(lines):
        found = [
            (group.switch_share, value)
            for group in arms_of(groups)
            if group.line == line and group.switch_share is not None and (value := value_of(group)) is not None
        ]
        if not found:
            continue
        found.sort(key=lambda point: point[0] or 0.0)
        moved = step * (index - (len(lines) - 1) / 2)
        at = [(share or 0.0) + moved for share, _ in found]
        means = [value.mean for _, value in found]
        style = line_style(index)
        for place, (_, value) in zip(at, found, strict=True):
            if value.low is not None and value.high is not None:
                axes.plot([place, place], [value.low, value.high], color=style["color"], lw=0.9, alpha=0.8)
        (handle,) = axes.plot(at, means, **style, lw=1.3, ms=4.5, gid=f"{mark}-{index}")
        legend.setdefault(legend_name(line), handle)


def line_style(index: int) -> dict[str, Any]:
    """Color, dashes and marker of the line of this number."""
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
            name = f"{baseline} ({legend_name(line)})" if len(lines) > 1 else baseline
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

    figure = figure_of(8.0, 3.8)
    axes, legend = figure.subplots(), dict[str, Any]()
    _draw_lines(axes, groups, share, legend, "gap")
    means = [found.mean for group in arms_of(groups) if (found := share(group)) is not None]
    bottom, top = min([0.0, *means]), max([100.0, *means])
    axes.set_ylim(max(bottom - 25, 50 - 100 * LARGEST_SHARE * 2), min(top + 25, 50 + 100 * LARGEST_SHARE * 2))
    for level, style in ((0, BASELINE_STYLES[SCRATCH]), (100, BASELINE_STYLES[SIXTEEN])):
        axes.axhline(level, lw=1.2, **style)
    axes.set_ylabel("share of the fair gap closed, %")
    _switch_axis(axes)
    legend_of(figure, legend, lines_of(groups))
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
    figure = figure_of(11.1, 3.3)
    legend: dict[str, Any] = {}
    for axes, (column, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.axhline(0, color=INK, lw=0.8)
        _draw_lines(axes, groups, partial(Group.mean, column=column), legend, column.replace("_", "-"))
        axes.set_ylabel(label)
        _switch_axis(axes)
        if column == "excess_area":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    legend_of(figure, legend, lines_of(groups))
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
    longest = max((len(group.name_with_seeds) for group in complete), default=0)
    figure = figure_of(max(9.0, 5.0 + longest / CHARACTERS_PER_INCH), 1.1 + 0.24 * len(complete))
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


def legend_of(figure: "Figure", handles: Mapping[str, Any], lines: Sequence[Line] = ()) -> None:
    """Put a legend above the panels of a figure, which grows by it.

    Args:
        figure: to put it on.
        handles: what it explains, by name.
        lines: that have a `legend_name` among these.
    """
    if handles:
        widest = max(map(len, handles))
        columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 / (widest + 8))))
        most = max(lines, key=len, default=())
        title = ", ".join(axis for axis, _ in most) if len(most) >= MANY_AXES else None
        rows = math.ceil(len(handles) / columns) + (title is not None)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW_INCHES * rows)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
            title=title,
            title_fontsize=8.5,
        )
