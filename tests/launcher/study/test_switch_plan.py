"""When to switch, by published laws and by studies that the tests make."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import tritrain
from made_studies import make_study
from tiny import tiny_tree

from launcher.errors import ConfigError
from launcher.plan.switch_laws import LAWS, TERNARY_BITS, Setting, qat_share
from launcher.study.analysis import groups_of
from launcher.study.arms import Arm
from launcher.study.reading import read_study
from launcher.study.switch_fit import Fit, fit_switch, lowest_place

SHARES = [0.2, 0.4, 0.6, 0.8, 0.9]


def fit_of(folder: Path) -> Fit | str:
    findings = read_study(folder)
    return fit_switch(findings, groups_of(findings))


def test_the_law_is_the_formula_of_its_source_and_grows_with_tokens() -> None:
    setting = Setting(parameters=1_177_000_000, tokens=42_000_000_000, bits=TERNARY_BITS)
    total = 42e9 / (1.177e9 * math.log2(3) / 8)
    share = qat_share(setting)
    assert share == pytest.approx(math.exp(math.log(total) - 6.7297 / math.log(total)) / total)
    assert 0.27 < share < 0.29  # so it would switch at 72 % of the run where the paper found 20 % best
    shares = [qat_share(Setting(parameters=10**8, tokens=tokens, bits=2)) or 0 for tokens in (10**9, 10**10, 10**12)]
    assert shares == sorted(shares)
    assert qat_share(Setting(parameters=10**9, tokens=10**8, bits=8)) is None


def test_laws_say_whether_they_were_found_for_runs_like_this_one() -> None:
    def holding(parameters: float, tokens: float) -> list[str]:
        setting = Setting(parameters=int(parameters), tokens=int(tokens), bits=TERNARY_BITS)
        return [law.name for law in LAWS if law.holds_for(setting)]

    assert holding(1e9, 40e9) == ["Nielsen et al.", "Compute-optimal QAT"]
    assert holding(125e6, 100e9) == ["Compute-optimal QAT", "ParetoQ"]
    assert holding(3e5, 4e6) == []


def test_the_lowest_place_is_that_of_numpys_parabola_and_stays_within_what_was_tried() -> None:
    rng = np.random.default_rng(0)
    at = np.asarray(SHARES)
    losses = {seed: list(3 + level + 0.4 * (at - 0.55) ** 2) for seed, level in (("0", 0.1), ("1", 0))}
    assert lowest_place(SHARES, losses) == pytest.approx((0.55, 0.55, 0.55))
    noisy = {seed: list(rng.normal(0, 0.01, 5) + values) for seed, values in losses.items()}
    bend, slope, _ = np.polyfit(SHARES * 2, np.concatenate([np.asarray(v) - np.mean(v) for v in noisy.values()]), 2)
    assert lowest_place(SHARES, noisy)[0] == pytest.approx(-slope / 2 / bend)
    falling = {"0": [3 - share for share in SHARES], "1": [3 - share**2 for share in SHARES]}
    assert lowest_place(SHARES, falling) == (0.9, 0.2, 0.9)  # nothing is known of a lowest place
    assert lowest_place([0.2, 0.5, 0.8], {"0": [3.1, 3.0, 3.1]})[1:] == (None, None)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_intervals_of_the_lowest_place_hold_it_in_95_of_100_studies(num_seeds: int) -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        losses = {
            str(seed): list(3 + rng.normal(0, 0.1) + 0.4 * (np.asarray(SHARES) - 0.6) ** 2 + rng.normal(0, 0.004, 5))
            for seed in range(num_seeds)
        }
        _, low, high = lowest_place(SHARES, losses)
        assert low is not None
        assert high is not None
        held += low <= 0.6 <= high
    assert 0.93 < held / 1000 < 0.97


def test_a_study_is_fitted_with_an_interval_over_its_seeds(tmp_path: Path) -> None:
    optimum, level = {"0": 0.5, "1": 0.55, "2": 0.6}, {"0": 0.2, "1": -0.1, "2": 0.0}

    def loss(arm: Arm) -> float:
        seed = arm.point["seed"]
        worse = 0.05 if arm.point.get("state") == "reset" else 0.0
        share = float(arm.point.get("switch", "0%")[:-1]) / 100
        return 3 + level[seed] + worse + 0.4 * (share - optimum[seed]) ** 2

    state = {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]}
    folder = make_study(
        tmp_path / "study", loss, switch=SHARES, axes={"state": state}, seeds=[0, 1, 2], baselines=["16-bit"]
    )
    fit = fit_of(folder)
    assert isinstance(fit, Fit)
    assert (fit.line, fit.num_seeds, fit.tried) == ("state keep", 3, tuple(SHARES))
    assert fit.share == pytest.approx(0.55)
    assert fit.low is not None
    assert fit.high is not None
    assert 0.5 < fit.low < 0.55 < fit.high < 0.6
    assert not fit.is_at_edge
    assert 0.6 in fit.within_noise
    assert 0.2 not in fit.within_noise


def test_an_optimum_at_the_edge_one_seed_and_too_few_points_are_said(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(tmp_path / "shards", tmp_path / "run")))

    def loss(arm: Arm) -> float:
        share = float(arm.point.get("switch", "0%")[:-1]) / 100
        return 3 - share + 0.3 * share**2

    rising = make_study(tmp_path / "rising", loss, switch=SHARES, baselines=[])
    few = make_study(tmp_path / "few", loss, switch=[0.2, 0.5], baselines=[])
    said = tritrain("plan", config, "--switch", "--study", rising, "--study", few)
    assert "a parabola through 5 switch points of arms, one seed." in said
    assert "the best share is at the edge of those that were tried, 20% to 90%" in said
    assert "no arms that differ in the switch point alone are complete at 3 points" in said
    assert "The published proposals DISAGREE" in said
    assert "rising DISAGREES with Nielsen et al. (20%)" in said.replace("\n", " ")
    assert "OTHER than this run" in said
    flat = make_study(tmp_path / "flat", lambda arm: 3 - 0.1 * ("50" in arm.name), switch=[0.2, 0.4, 0.5, 0.8, 0.9])
    assert "these arms do not tell where the best switch is" in tritrain("plan", config, "--study", flat)


def test_numbers_are_printed_as_json(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(tmp_path / "shards", tmp_path / "run")))
    found = json.loads(tritrain("plan", config, "--switch", "--json"))
    assert found["configured_share"] == 0.5
    assert [law["share"] for law in found["published"]][::2] == [0.2, 0.9]
    assert found["studies"] == []
    assert "Nothing here settles it" in tritrain("plan", config, "--switch")
    with pytest.raises(ConfigError, match="is no study's folder"):
        tritrain("plan", config, "--study", tmp_path)
