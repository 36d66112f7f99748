"""The power law of the distance from 16 bits over ternary tokens."""

import math
import random
import re
import statistics
from pathlib import Path

import pytest
from made_studies import make_study

from launcher.study.analysis import distances, groups_of
from launcher.study.arms import Arm
from launcher.study.page import study_page
from launcher.study.reading import read_study
from launcher.study.report import figures_of, numbers_of
from launcher.study.token_fit import TokenFit, axis_of_tokens, fit_tokens, ternary_tokens

TOKENS = [4_096 * 2**power for power in range(9)]


def made(exponent: float, floor: float, noise: float, seed: int = 0, seeds: int = 3) -> dict[int, list[float]]:
    drawn = random.Random(seed)
    return {
        tokens: [(50 * tokens**-exponent + floor) * math.exp(drawn.gauss(0, noise)) for _ in range(seeds)]
        for tokens in TOKENS
    }


def fitted(points: dict[int, list[float]]) -> TokenFit:
    fit = fit_tokens(points)
    assert isinstance(fit, TokenFit)
    return fit


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.1])
def test_a_power_law_is_found(exponent: float) -> None:
    fit = fitted(made(exponent, 0.0, 1e-6))
    assert fit.exponent.mean == pytest.approx(exponent, abs=1e-5)
    assert fit.scale == pytest.approx(50, rel=1e-4)
    assert fit.floor is None
    assert fit.distance(1e6) == pytest.approx(50 * 1e6**-exponent, rel=1e-4)


@pytest.mark.parametrize("exponent", [0.4, 0.8])
@pytest.mark.parametrize("floor", [0.02, 0.2])
def test_so_is_one_with_a_floor(exponent: float, floor: float) -> None:
    fit = fitted(made(exponent, floor, 0.0))
    assert fit.floor is not None
    assert fit.floor.mean == pytest.approx(floor, rel=1e-4)
    assert fit.exponent.mean == pytest.approx(exponent, rel=1e-4)
    assert fit.distance(TOKENS[4]) == pytest.approx(50 * TOKENS[4] ** -exponent + floor, rel=1e-6)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = floors = 0
    for seed in range(200):
        fit = fitted(made(0.5, 0.0, 0.2, seed))
        floors += fit.floor is not None
        if fit.floor is None:
            assert fit.exponent.has_interval
            held += (fit.exponent.low or 0.0) <= 0.5 <= (fit.exponent.high or 0.0)
    assert floors <= 16  # 5 % of 200, and three standard deviations
    assert held >= 0.9 * (200 - floors)


@pytest.mark.parametrize("cliff", [3.0, 10.0, 30.0, 100.0])
def test_a_cliff_before_a_plateau_has_a_fit(cliff: float) -> None:
    """Any exponent that is large enough fits with a floor, so the points settle none."""
    for seed in range(25):
        drawn = random.Random(seed)
        num = drawn.randint(4, 8)
        points = {
            tokens: [0.01 * (1.0 if index else cliff) * math.exp(drawn.gauss(0, 0.02)) for _ in range(3)]
            for index, tokens in enumerate(TOKENS[:num])
        }
        fit = fitted(points)
        numbers = [(math.log(tokens), math.log(value)) for tokens, values in points.items() for value in values]
        slope = statistics.linear_regression(*zip(*numbers, strict=True)).slope
        if fit.floor is None:
            assert fit.exponent.mean == pytest.approx(-slope, rel=1e-6)
        else:
            assert fit.floor.has_interval
        assert fit.exponent.has_interval
        assert math.isfinite(fit.spread)
        assert math.isfinite(fit.distance(TOKENS[0]))


def test_too_few_points_have_no_fit() -> None:
    points = dict(list(made(0.5, 0.0, 0.1).items())[:3]) | {TOKENS[5]: [-0.01, 0.0]}
    assert fit_tokens(points) == "arms at fewer than 4 numbers of tokens are complete and above 16 bits with all seeds"


def test_a_point_of_which_a_seed_is_not_above_16_bits_is_left_out_as_a_whole() -> None:
    points = made(0.5, 0.0, 0.1)
    assert fit_tokens(points | {TOKENS[-1] * 2: [0.5, 0.5, -0.01]}) == fit_tokens(points)


SHARES = {"few": 5, "some": 20, "more": 50, "most": 100}


def loss_of(arm: Arm) -> float:
    point = arm.point
    dense = 3.0 + 0.1 * int(point["seed"])
    if point.get("baseline") == "16-bit":
        return dense
    wobble = 1 + 1e-4 * (int(point["seed"]) - 1)
    return dense + wobble * (0.4 if point["teacher"] == "own" else 0.5) * SHARES[point["data"]] ** -0.5


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(
        tmp_path_factory.mktemp("least") / "study",
        loss_of,
        sections={"phases": [{"precision": "16-bit", "steps": 100}, {"precision": "ternary", "steps": 5}]},
        axes={
            "data": {name: [f"phases.1.steps={steps}"] for name, steps in SHARES.items()},
            "teacher": {"none": [], "own": ["phases.1.distillation={temperature: 2.0}"]},
        },
        seeds=[0, 1, 2],
        baselines=["16-bit"],
    )


def test_the_axis_of_tokens_is_found_and_distances_are_paired(study: Path) -> None:
    groups = groups_of(read_study(study))
    assert axis_of_tokens(groups) == "data"
    arms = {(group.point["data"], group.point.get("teacher")): group for group in groups if group.baseline == "none"}
    most = arms["most", "own"]
    per_step = (ternary_tokens(arms["some", "own"]) or 0) // 20
    assert ternary_tokens(most) == 100 * per_step
    assert distances(most, groups) == pytest.approx({"0": 0.04, "1": 0.04, "2": 0.04}, rel=1e-3)


def test_the_report_shows_the_curve_and_its_fit(study: Path) -> None:
    findings = read_study(study)
    groups = groups_of(findings)
    figures = figures_of(findings, groups)
    left, right = figures["tokens"].axes
    drawn = {line.get_gid(): line for axes in (left, right) for line in axes.get_lines() if line.get_gid()}
    for index, factor in enumerate((0.5, 0.4)):
        assert list(drawn[f"distance-{index}"].get_ydata()) == pytest.approx(
            [factor * steps**-0.5 for steps in SHARES.values()]
        )
        fit = drawn[f"fit-{index}"]
        assert fit.get_ydata()[-1] == pytest.approx(factor * 0.1, rel=1e-3)
    assert list(drawn["baseline-dense"].get_ydata()) == pytest.approx([3.1] * 4)
    page = study_page(findings, groups, figures)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index(">teacher own</th>") :])
    assert cells[:3] == ["0.500 (0.500 to 0.500)", "0.707 (0.707 to 0.707)", "none found"]
    (none, own) = numbers_of(findings, groups)["ternary_tokens"]
    assert (none["line"], own["line"]) == ("teacher none", "teacher own")
    assert own["exponent"]["mean"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("baselines", "dense"),
    [([], 3.0), (["16-bit"], None), (["16-bit"], 9.0)],
    ids=["no baseline", "baseline not complete", "none above it"],
)
def test_losses_are_shown_where_nothing_is_above_16_bits(
    tmp_path: Path, baselines: list[str], dense: float | None
) -> None:
    folder = make_study(
        tmp_path / "study",
        lambda arm: 3.1 if arm.baseline == "none" else dense,
        axes={"data": {name: [f"phases.1.steps={steps}"] for name, steps in SHARES.items()}},
        baselines=baselines,
        sections={"phases": [{"precision": "16-bit", "steps": 100}, {"precision": "ternary", "steps": 5}]},
    )
    findings = read_study(folder)
    groups = groups_of(findings)
    figures = figures_of(findings, groups)
    left, right = figures["tokens"].axes
    assert [text.get_text() for text in left.texts] == ["nothing above a 16-bit baseline"]
    assert "line-0" in {line.get_gid() for line in right.get_lines()}
    assert "How much data" in study_page(findings, groups, figures)
