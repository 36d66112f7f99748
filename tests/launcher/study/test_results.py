"""The excess over a twin from logs that the tests write, which may be logged at other steps."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tree

from launcher.config.file import parse_config
from launcher.plan.plan import make_plan
from launcher.study.results import differences_from, excess


def rows(losses: dict[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": loss} for step, loss in losses.items()]


def test_rows_of_the_same_steps_are_subtracted_and_others_are_averaged_first() -> None:
    often = rows({4: 9.0, 5: 3.0, 6: 3.2, 8: 3.4, 12: 3.0})
    seldom = rows({4: 1.0, 8: 3.0, 10: 2.0, 12: 2.5})
    found = differences_from(often, seldom, 4)
    # steps 5 to 8: (3.0 + 3.2 + 2 * 3.4) / 4 - 3.0; steps 9 to 12: 3.0 - (2 * 2.0 + 2 * 2.5) / 4
    assert found == {(4, 8): pytest.approx(0.25), (8, 12): pytest.approx(0.75)}
    assert differences_from(often, often, 4) == {(4, 5): 0, (5, 6): 0, (6, 8): 0, (8, 12): 0}


def test_steps_of_which_a_row_is_missing_or_crosses_the_switch_are_left_out() -> None:
    ours = rows({4: 1.0, 5: 3.0, 6: 3.0, 8: 3.0})
    assert differences_from(ours, rows({3: 1.0, 5: 1.0, 6: 1.0, 8: 2.0}), 4) == {(5, 6): 2.0, (6, 8): 1.0}
    assert differences_from(ours, [], 4) == {}


def test_peak_and_area_are_those_of_the_steps_after_the_switch(tmp_path: Path) -> None:
    plan = make_plan(parse_config(tiny_tree(tmp_path, tmp_path)), 1)  # four steps of 256 tokens, then four ternary ones
    twin = rows(dict.fromkeys(range(1, 9), 3.0))
    ours = rows({1: 9.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.5, 6: 3.1, 7: 2.9, 8: 3.0})
    assert excess(ours, twin, plan) == {
        "excess_peak": pytest.approx(0.5),
        "excess_area": pytest.approx((0.5 + 0.1 - 0.1) * 256),
    }
    assert excess(ours[:4], twin, plan) == {"excess_peak": None, "excess_area": None}
