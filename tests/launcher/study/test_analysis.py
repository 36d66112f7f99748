"""Which arm, baseline and learning rate is the best: of those with the most seeds, on the seeds that both have."""

from pathlib import Path

import pytest
from made_studies import make_study

from launcher.study.analysis import best_of, gaps_of, groups_of
from launcher.study.arms import Arm
from launcher.study.reading import read_study
from launcher.study.report import numbers_of
from launcher.study.results import table_of

QUANTIZER = {"gaussian": [], "nielsen": ["phases.1.quantization={preset: nielsen-2025}"]}
LUCKY = {"0": 0.0, "1": 0.5, "2": 0.6}


@pytest.mark.parametrize("higher", [-0.1, 0.1])
def test_rates_are_compared_on_the_seeds_that_both_have(tmp_path: Path, higher: float) -> None:
    """Seed 0 is 0.3 below the mean, and the highest rate has no other; the middle one has them all and is best of two.

    A mean over unequal seeds would always choose the highest rate, and its result would have no interval. Whether it is
    better on its seed is said.
    """
    above = {"0.001": 0.05, "0.002": 0.0, "0.004": higher}

    def loss(arm: Arm) -> float:
        level = {"16-bit": 3.0, "scratch": 3.4}.get(arm.baseline, 3.1)
        return level + LUCKY[arm.point["seed"]] + above.get(arm.point.get("rate", ""), 0.0)

    folder = make_study(
        tmp_path / "study",
        loss,
        switch=[0.5],
        seeds=[0, 1, 2],
        sweep={"rates": [1e-3, 2e-3, 4e-3], "only": [{"baseline": ["16-bit", "scratch"]}]},
        exclude=[{"rate": 4e-3, "seed": [1, 2]}],
        sections={"training": {"total_steps": 20}},
    )
    findings = read_study(folder)
    groups = groups_of(findings)
    numbers = {arm["baseline"]: arm for arm in numbers_of(findings, groups)["arms"]}
    mean = sum(LUCKY.values()) / len(LUCKY)
    arms = [record.arm for record in findings.records if record.arm is not None]
    table = {cells[0].split()[0]: cells for cells in table_of(arms, [record.row for record in findings.records])}
    for name, level in (("16-bit", 3.0), ("scratch", 3.4)):
        assert numbers[name]["best_rate"] == "0.002"
        assert numbers[name]["held_out_loss"] == pytest.approx(level + mean)
        assert (numbers[name]["seeds"], numbers[name]["seeds_planned"]) == (3, 3)
        assert table[name][:3] == [f"{name} rate 0.002", "3 of 3", f"{level + mean:.4f}"]
    problems = gaps_of(next(group for group in groups if group.baseline == "none"), groups)[0].problems
    said = [
        f"{name} is better at the learning rate 0.004 than at 0.002, on the 1 of 3 seeds that it was trained with; "
        "train it with the others"
        for name in ("16-bit", "scratch")
    ]
    assert [each for each in problems if "trained with" in each] == (said if higher < 0 else [])


LEVELS = {"0": 0.0, "1": 0.5, "2": 0.1}


def test_the_best_arm_and_scratch_are_chosen_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    """A lucky seed makes no arm the best, nor a ternary model from scratch the one that the fair gap is to."""

    def loss(arm: Arm) -> float | None:
        worse, seed = arm.point.get("quantizer") == "nielsen", arm.point["seed"]
        if arm.baseline == "scratch":
            return None if worse and seed != "0" else 3.4 + 0.05 * worse + LEVELS[seed]
        if arm.baseline == "16-bit":
            return 3.0 + LEVELS[seed]
        left_out = "1" if worse else "2"
        return None if seed == left_out else 3.1 + 0.05 * worse + LEVELS[seed]

    axes = {"quantizer": QUANTIZER}
    groups = groups_of(read_study(make_study(tmp_path / "study", loss, switch=[0.5], axes=axes, seeds=[0, 1, 2])))
    best = best_of(groups)
    assert best is not None
    assert best.point["quantizer"] == "gaussian"
    assert sum(best.losses.values()) / 2 > 3.3  # the other one's mean is 3.2
    fair, other = gaps_of(best, groups)
    assert [gap.scratch.point["quantizer"] for gap in (fair, other)] == ["gaussian", "nielsen"]
    assert fair.size.num == 3
