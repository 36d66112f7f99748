"""What figures of studies show of panels that share axes, and that there is room for what is written on them."""

import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from made_studies import make_study
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from launcher.study.analysis import groups_of
from launcher.study.loss_figure import loss_figure
from launcher.study.reading import read_study
from launcher.study.report import figures_of

AXES = {
    "state-of-the-optimizer": {"keep-all-of-it": [], "reset-all-of-it": ["phases.1.transition.optimizer=reset"]},
    "ramp-after-the-switch": {"none-at-all": [], "linear-in-steps": ["phases.1.transition.ramp={steps: 20}"]},
    "quantization": {
        "the-default": [],
        "of-the-paper": ["phases.1.quantization={preset: nielsen-2025}"],
        "bitnet": ["phases.1.quantization={preset: bitnet-b1.58}"],
    },
    "learning-rate-schedule": {"warmup-stable-decay": [], "cosine": ["schedule={shape: cosine, warmup_steps: 2}"]},
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    folder = make_study(
        tmp_path_factory.mktemp("many") / "study", lambda arm: 3 + len(arm.name) / 1000, switch=[0.5, 0.8], axes=AXES
    )
    findings = read_study(folder)
    drawn = dict(figures_of(findings, groups_of(findings)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib says it of a figure without room
        for figure in drawn.values():
            figure.draw_without_rendering()
    return drawn


def texts_of(axes: Axes) -> list[Bbox]:
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
    return [text.get_window_extent() for text in texts if text.get_text() and axes.axison]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "switch", "gap", "excess", "arms"])
def test_texts_do_not_touch_each_other_and_are_not_cut(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    boxes = [box for axes in figure.axes for box in texts_of(axes)]
    assert len(boxes) >= 2
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "switch", "gap", "excess"])
def test_the_legend_is_above_all_panels(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
    assert min(axes.get_window_extent().height for axes in figure.axes) > 1.2 * figure.dpi


@pytest.mark.slow
def test_lines_of_many_axes_are_named_by_their_values_below_the_names_of_the_axes(figures: dict[str, Figure]) -> None:
    (legend,) = figures["switch"].legends
    assert legend.get_title().get_text() == (
        "state-of-the-optimizer, ramp-after-the-switch, quantization, learning-rate-schedule"
    )
    names = [text.get_text() for text in legend.get_texts()]
    assert "keep-all-of-it, none-at-all, the-default, warmup-stable-decay" in names
    assert len(names) == len(set(names))


def test_losses_are_whole_on_the_axis_that_panels_share_and_arms_that_have_not_begun_have_none(tmp_path: Path) -> None:
    lengths = {"short": ["training.total_steps=40"], "long": [], "never": ["training.total_steps=60"]}
    axes = {"length": lengths}
    folder = make_study(tmp_path / "study", lambda arm: 3.1, switch=[0.5], axes=axes, baselines=[])
    for file in (folder / "arms" / "length-never").iterdir():
        file.unlink()
    findings = read_study(folder)
    figure = loss_figure(findings, groups_of(findings))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["length short", "length long"]
    for axes in panels:
        for line in axes.lines:
            assert max(line.get_xdata()) <= axes.get_xlim()[1]
        assert not axes.texts
    for below in figure.axes[2:]:
        assert [text.get_text() for text in below.texts] == ["no 16-bit twin"]
    figure.draw_without_rendering()  # a mark beyond the axis leaves no room for the panels, which is a warning


def test_the_losses_of_a_twin_are_in_every_panel_that_begins_with_them(tmp_path: Path) -> None:
    """Also where the 16-bit baseline is that of another schedule, which parts from the arm's at the switch."""
    schedules = {
        "wsd": [],
        "sooner": ["schedule={shape: wsd, warmup_steps: 2, decay_fraction: 0.4}"],
        "cosine": ["schedule={shape: cosine, warmup_steps: 2}"],
    }
    base = {"schedule": {"shape": "wsd", "warmup_steps": 2, "decay_fraction": 0.2}}
    exclude = [{"baseline": "16-bit", "schedule": "sooner"}]
    axes = {"schedule": schedules}
    keys: dict[str, Any] = {"switch": [0.5], "axes": axes, "exclude": exclude, "baselines": ["16-bit"]}
    findings = read_study(make_study(tmp_path / "study", lambda arm: 3.1, sections=base, **keys))
    panels = loss_figure(findings, groups_of(findings)).axes[:3]
    for index, panel in enumerate(panels):
        (dense,) = (line for line in panel.lines if str(line.get_gid()).startswith(f"arm-{index}-16-bit"))
        assert min(dense.get_xdata()) < 0.1 * max(dense.get_xdata())


def test_the_legend_of_losses_is_in_the_order_of_switch_points(tmp_path: Path) -> None:
    """Also where panels have different ones."""
    exclude = [{"state": "first", "switch": ["20%"]}, {"state": "second", "switch": ["80%"]}]
    states = {"first": [], "second": ["phases.1.transition.optimizer=reset"]}
    folder = make_study(
        tmp_path / "study", lambda arm: 3.1, switch=[0.8, 0.5, 0.2], axes={"state": states}, exclude=exclude
    )
    findings = read_study(folder)
    (legend,) = loss_figure(findings, groups_of(findings)).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["scratch", "16-bit", "switch at 20 %", "switch at 50 %", "switch at 80 %"]
