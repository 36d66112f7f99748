"""The figure of a study's training losses: a panel for each combination of the other axes than the switch point."""

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.report.plots import INK, ORDER_COLOURS, RUN_COLOURS, figure_of, styled, token_axis
from launcher.study.analysis import SCRATCH, SIXTEEN, Group, best_among, dense_of, scratches_of
from launcher.study.config import NO_BASELINE
from launcher.study.curves import Curve, excess_curve, loss_curve, mean_curve, reference_of, switch_tokens
from launcher.study.figures import BASELINE_STYLES, Line, arms_of, legend_of, line_name, lines_of
from launcher.study.reading import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS_PER_ROW = 3

CHARACTERS_OF_A_TITLE = 48
"""In a line above a panel."""

SETTLED = 0.12
"""Share of a run after which the losses decide what an axis shows."""


@styled()
def loss_figure(findings: Findings, groups: Sequence[Group]) -> "Figure":
    """Training loss against tokens: a panel for each line, above the losses, below what is above 16 bits."""
    begun = [group for group in groups if any(record.log for record in group.members)]
    lines: list[Line] = lines_of(begun) or [()]
    columns = 2 if len(lines) == 4 else min(PANELS_PER_ROW, len(lines))
    blocks = math.ceil(len(lines) / columns)
    figure = figure_of(max(5.6, 3.5 * columns), 4.6 * blocks + 0.3)
    grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False, height_ratios=[1.35, 1] * blocks)
    shares = sorted({share for group in arms_of(groups) if (share := group.switch_share) is not None})
    colors = {
        share: ORDER_COLOURS[round(place * (len(ORDER_COLOURS) - 1) / max(1, len(shares) - 1))]
        for place, share in enumerate(shares)
    }
    legend: dict[tuple[float, str], Any] = {}
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
                    legend.setdefault((_place(group), name), handle)
            _mark_switch(above, below, group, style)
        if not drawn[1]:
            how = {"transform": below.transAxes, "ha": "center", "va": "center", "fontsize": 8, "color": INK}
            below.text(0.5, 0.25, "no 16-bit twin", **how)
        title = fill(line_name(line), CHARACTERS_OF_A_TITLE, break_on_hyphens=False) if line else ""
        above.set_title(title, fontsize=9)
        for axes, label in ((above, "training loss, nats/token"), (below, "above 16 bits, nats/token")):
            if index % columns == 0:
                axes.set_ylabel(label)
    for below in grid[1::2].flat:  # after all curves are drawn: the panels share this axis, and this fixes its end
        token_axis(below)
        below.tick_params(labelbottom=True)
    for index in range(len(lines), blocks * columns):
        for part in (0, 1):
            grid[2 * (index // columns) + part, index % columns].set_axis_off()
    for part, axes_of_part in enumerate((grid[0::2].flat, grid[1::2].flat)):
        _fit([curve for drawn in shown for curve in drawn[part]], axes_of_part, spikes=part == 1)
    legend_of(figure, {name: legend[place, name] for place, name in sorted(legend, key=itemgetter(0))})
    return figure


def _place(group: Group) -> float:
    """Where the legend has a group: baselines first, as they are drawn, then arms by their switch points."""
    return -1.0 if group.baseline != NO_BASELINE or group.switch_share is None else group.switch_share


def _baselines_of(arms: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The baselines with which arms are drawn: of several from scratch or after training, all; also others' twins."""
    twins = {record.row.get("twin") for group in arms for record in group.members}
    wanted = {
        id(each): each
        for each in groups
        if each.baseline == SIXTEEN and any(record.name in twins for record in each.members)
    }
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
            best = best_among(same)
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
