"""Figures of studies with many long combinations have room for what is written on them."""

import warnings
from itertools import combinations

import pytest
from made_studies import make_study
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from launcher.study.analysis import groups_of
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


@pytest.mark.parametrize("name", ["loss", "switch", "gap", "excess", "arms"])
def test_texts_do_not_touch_each_other_and_are_not_cut(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    boxes = [box for axes in figure.axes for box in texts_of(axes)]
    assert len(boxes) >= 2
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


@pytest.mark.parametrize("name", ["loss", "switch", "gap", "excess"])
def test_the_legend_is_above_all_panels(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
    assert min(axes.get_window_extent().height for axes in figure.axes) > 1.2 * figure.dpi
