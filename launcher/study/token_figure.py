"""The figure and the table of how the distance from 16 bits falls with the tokens that are trained in ternary."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.process.console import human_count
from launcher.report.plots import INK, figure_of, styled
from launcher.study.analysis import Group, dense_of, distances
from launcher.study.config import POST_TRAINING
from launcher.study.figures import (
    BASELINE_STYLES,
    SIXTEEN,
    Line,
    arms_of,
    legend_name,
    legend_of,
    line_name,
    line_style,
)
from launcher.study.intervals import Estimate, mean_of
from launcher.study.token_fit import TokenFit, above_dense_at, axis_of_tokens, fit_tokens, ternary_tokens, without

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def token_lines(groups: Sequence[Group]) -> dict[Line, list[Group]]:
    """The complete arms that differ in ternary tokens alone, by their values on the other axes, fewest tokens first."""
    axis = axis_of_tokens(groups)
    lines: dict[Line, list[Group]] = {}
    if axis is None:
        return lines
    for group in arms_of(groups):
        if group.losses and ternary_tokens(group) is not None:
            lines.setdefault(without(group, axis), []).append(group)
    return {line: sorted(arms, key=lambda arm: ternary_tokens(arm) or 0) for line, arms in lines.items()}


def fits_of(groups: Sequence[Group]) -> dict[Line, TokenFit | str]:
    """The power law of each line, or why there is none."""
    return {line: fit_tokens(_points(arms, groups)) for line, arms in token_lines(groups).items()}


def _points(arms: Sequence[Group], groups: Sequence[Group]) -> dict[int, list[float]]:
    """The distances of a line's arms from 16 bits, by their ternary tokens."""
    return {ternary_tokens(arm) or 0: list(distances(arm, groups).values()) for arm in arms}


@styled()
def token_figure(groups: Sequence[Group]) -> "Figure":
    """Distance from 16 bits, with its fits, and held-out loss against ternary tokens."""
    lines, fits = token_lines(groups), fits_of(groups)
    figure = figure_of(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    legend: dict[str, Any] = {}
    for index, (line, arms) in enumerate(lines.items()):
        style = line_style(index)
        points = {tokens: mean_of(values) for tokens, values in _points(arms, groups).items() if values}
        near = [(tokens, value) for tokens, value in points.items() if value.mean > 0]
        for tokens, value in near:
            if value.low is not None and value.high is not None:
                low = max(value.low, value.mean / 5)  # an axis of logarithms has no 0
                left.plot([tokens, tokens], [low, value.high], color=style["color"], lw=0.9, alpha=0.8)
        if near:
            at, means = [tokens for tokens, _ in near], [value.mean for _, value in near]
            left.plot(at, means, **style | {"ls": ""}, ms=4.5, gid=f"distance-{index}")
        if isinstance(fit := fits[line], TokenFit) and near:
            curve = np.geomspace(near[0][0], near[-1][0], 100)
            left.plot(curve, [fit.distance(each) for each in curve], color=style["color"], lw=1.2, gid=f"fit-{index}")
        own = [(ternary_tokens(arm) or 0, estimate.mean) for arm in arms if (estimate := arm.mean("held_out_loss"))]
        (legend[legend_name(line)],) = right.plot(*zip(*own, strict=True), **style, lw=1.3, ms=4.5, gid=f"line-{index}")
    _draw_baselines(left, right, lines, groups, legend)
    left.set_ylabel("above 16 bits of as many tokens, nats/token")
    right.set_ylabel("held-out loss, mean over seeds, nats/token")
    if left.lines:
        left.set_yscale("log")
        _label(left.yaxis, "{:g}".format)
    else:
        left.set_yticks([])
        left.text(0.5, 0.5, "nothing above a 16-bit baseline", transform=left.transAxes, ha="center", color=INK)
    for axes in (left, right):
        axes.set_xscale("log")
        _label(axes.xaxis, human_count)
        axes.set_xlabel("ternary tokens")
    legend_of(figure, legend, list(lines))
    return figure


def _label(axis: "Axis", words: Callable[[float], str]) -> None:
    """Label 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_formatter(NullFormatter())


def _draw_baselines(
    left: "Axes", right: "Axes", lines: Mapping[Line, Sequence[Group]], groups: Sequence[Group], legend: dict[str, Any]
) -> None:
    """Draw 16 bits of as many tokens, and what is rounded after training without a ternary token."""
    arms = next(iter(lines.values()))
    dense = [
        (ternary_tokens(arm) or 0, estimate.mean)
        for arm in arms
        if (each := dense_of(arm, groups)) and (estimate := each.mean("held_out_loss"))
    ]
    if dense:
        (legend[SIXTEEN],) = right.plot(*zip(*dense, strict=True), **BASELINE_STYLES[SIXTEEN], gid="baseline-dense")
    for number, group in enumerate(each for each in groups if each.baseline == POST_TRAINING and each.losses):
        values = list(distances(group, groups).values())
        for axes, estimate in ((left, mean_of(values) if values else None), (right, group.mean("held_out_loss"))):
            if estimate is not None:
                gid = f"rounded-{number}" if axes is left else f"rounded-loss-{number}"
                legend.setdefault(POST_TRAINING, axes.axhline(estimate.mean, **BASELINE_STYLES[POST_TRAINING], gid=gid))


def token_rows(groups: Sequence[Group]) -> Iterator[tuple[str, ...]]:
    """A row of the table for each line: arms, exponent, what doubling does, floor, and tokens that were fitted."""
    for line, fit in fits_of(groups).items():
        if isinstance(fit, str):
            yield line_name(line), fit, "", "", ""
            continue
        shrinks = Estimate(
            mean=2**-fit.exponent.mean,
            low=2 ** -(fit.exponent.high or 0.0),
            high=2 ** -(fit.exponent.low or 0.0),
            standard_error=None,
            num=fit.exponent.num,
        )
        points = _points(token_lines(groups)[line], groups)
        tokens = above_dense_at(points)
        left_out = f", {len(points) - len(tokens)} left out" if len(tokens) < len(points) else ""
        yield (
            line_name(line),
            _with_ends(fit.exponent),
            _with_ends(shrinks),
            "none found" if fit.floor is None else _with_ends(fit.floor),
            f"{human_count(min(tokens))} to {human_count(max(tokens))}{left_out}",
        )


def _with_ends(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})".replace("-", "\N{MINUS SIGN}")
