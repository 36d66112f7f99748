"""Draw quantization: curves over all layers, and heat maps of layers over a phase.

A heat map in an SVG is drawn as one outline for each of ten colors, on a grid of at most `NUM_COLUMNS` columns and
with neighbors of one color merged, so that a model of many layers still makes a small page.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launcher.process.console import human_count
from launcher.report.history import LayerGrid
from launcher.report.plots import HEAT_COLOURS, Panel, figure_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


NUM_COLUMNS = 60


QUANT_PANELS = (
    Panel("quant/zero_share", "Weights at 0, %", scale=100, is_close=True),
    Panel("quant/plus_share", "Weights at the largest code (+1), %", scale=100, is_close=True),
    Panel("quant/minus_share", "Weights at the smallest code (-1), %", scale=100, is_close=True),
    Panel("quant/flip_rate", "Codes that changed in a step, % (log scale)", scale=100, is_log=True, is_close=True),
    Panel("quant/moved_share", "Codes other than at the phase's first look, %", scale=100, is_close=True),
    Panel("quant/scale_drift", "Change of the scale since then, %", scale=100, is_close=True),
    Panel("quant/weight_error", "Error of the weights, % of their norm", scale=100, is_close=True),
    Panel("quant/input_error", "Error of the inputs, % of their norm", scale=100, is_close=True),
    Panel("quant/threshold_distance", "Distance of weights to a threshold, scales", is_close=True),
    Panel("quant/clipped_share", "Inputs that were clipped, %", scale=100, is_close=True),
    Panel("quant/dead_row_share", "Rows with no code but 0, %", scale=100, is_close=True),
    Panel("quant/grad_norm", "Gradient norm of the quantized layers (log scale)", is_log=True, is_close=True),
)


@dataclass(frozen=True)
class HeatMap:
    """A figure of each layer to be drawn over a phase: its key, a title, and its unit as a factor."""

    key: str
    title: str
    scale: float = 100.0
    is_log: bool = False


HEAT_MAPS = (
    HeatMap("zero_share", "Weights at 0, %"),
    HeatMap("flip_rate", "Codes that changed in a step, % (log scale)", is_log=True),
    HeatMap("weight_error", "Error of the weights, % of their norm"),
    HeatMap("grad_norm", "Gradient norm (log scale)", scale=1.0, is_log=True),
)


HEAT_MAP_NOTE = (
    "A row is a layer, the model's first on top; a column is a stretch of the phase. Dark is low and yellow high, by "
    "the scale at the right."
)


@styled()
def heat_map_figure(heat_map: HeatMap, grid: LayerGrid) -> "Figure":
    """Draw one figure of all layers of a phase: the first layer on top, tokens to the right, its value as color."""
    values_LS, edges = on_even_columns(grid, heat_map.scale * grid.values[heat_map.key])
    finite = values_LS[np.isfinite(values_LS) & ((values_LS > 0) | (not heat_map.is_log))]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    bounds = np.geomspace(low, high, 11) if heat_map.is_log else np.linspace(low, high, 11)
    bands_LS = np.searchsorted(bounds[1:-1], values_LS, side="right")
    num_layers = len(grid.names)
    figure = figure_of(5.6, min(6.0, 1.4 + 0.11 * num_layers))
    axes, bar = figure.subplots(1, 2, width_ratios=(28, 1))
    for band, color in enumerate(HEAT_COLOURS):
        _fill(axes, _runs((bands_LS == band) & np.isfinite(values_LS), edges), color, f"band-{band}")
        _fill(bar, [(0.0, 1.0, float(band))], color, f"key-{band}")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(num_layers, 0), xlabel="tokens")
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    ticks = layer_ticks(grid.names)
    axes.set_yticks([row + 0.5 for row in ticks.values()], list(ticks), fontsize=7)
    bar.set(xlim=(0, 1), ylim=(0, len(HEAT_COLOURS)), xticks=[])
    bar.yaxis.tick_right()
    bar.set_yticks(range(0, 11, 2), [f"{bound:.3g}" for bound in bounds[::2]], fontsize=7)
    for part in (axes, bar):
        part.grid(visible=False)
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    return figure


def on_even_columns(grid: LayerGrid, values_SL: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spread looks at uneven steps over columns of even width: each has the mean of its looks, or the look before.

    Returns:
        The values as [L, columns], NaN before the first look, and the columns' edges in tokens.
    """
    first, last = float(grid.tokens[0]), float(grid.tokens[-1])
    edges = np.linspace(first, last if last > first else first + 1, min(NUM_COLUMNS, max(1, len(grid.tokens))) + 1)
    column_S = np.clip(np.searchsorted(edges, grid.tokens, side="right") - 1, 0, len(edges) - 2)
    columns: list[NDArray[np.float64]] = []
    for column in range(len(edges) - 1):
        here = values_SL[column_S == column]
        here = here[np.isfinite(here).all(axis=1)]
        before = columns[-1] if columns else np.full(values_SL.shape[1], np.nan)
        columns.append(here.mean(axis=0) if len(here) else before)
    return np.stack(columns, axis=1), edges


def layer_ticks(names: tuple[str, ...]) -> dict[str, int]:
    """Choose labels and their rows: every layer's of a small model, else the first layer's of every few blocks."""
    blocks = [match[1] if (match := re.search(r"layers\.(\d+)\.", name)) else name for name in names]
    if len(names) <= 28:
        return {
            f"{block} {name.rpartition('.')[2].removesuffix('_proj')}": row
            for row, (block, name) in enumerate(zip(blocks, names, strict=True))
        }
    starts = {f"block {block}": blocks.index(block) for block in dict.fromkeys(blocks)}
    every = -(-len(starts) // 16)
    return {label: row for position, (label, row) in enumerate(starts.items()) if position % every == 0}


def _runs(is_band_LS: NDArray[np.bool_], edges: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """Find stretches of a row that have one color, as (left, right, row)."""
    found = []
    for row, flags in enumerate(is_band_LS):
        position = 0
        for is_on, group in groupby(flags.tolist()):
            length = len(list(group))
            if is_on:
                found.append((float(edges[position]), float(edges[position + length]), float(row)))
            position += length
    return found


def _fill(axes: "Axes", runs: list[tuple[float, float, float]], color: str, mark: str) -> None:
    """Fill stretches, each one row high, as a single outline."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not runs:
        return
    corners = [((left, row), (right, row), (right, row + 1), (left, row + 1), (left, row)) for left, right, row in runs]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(runs)
    outline = Path([corner for box in corners for corner in box], codes)
    # A hair of an edge in the same color hides the seams that renderers leave between neighbors.
    axes.add_patch(PathPatch(outline, facecolor=color, edgecolor=color, lw=0.3, gid=mark))
