"""The spike at a switch, on made curves whose spike is known: falling and flat, noisy, short, with gaps, with ramps."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from launcher.run.recovery import LoggedLoss, SpikeWatch, Transition, measure

CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": lambda t: np.full(len(t), 2.0),
    "falling": lambda t: 5 - 0.005 * t,
    "power": lambda t: 2.2 + 8 * (1 + t) ** -0.5,
}

SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lasting": lambda u: np.ones(len(u)),
    "decaying": lambda u: np.exp(-u / 30),
    "ramped": lambda u: np.where(u < 40, u / 40, np.exp(-(u - 40) / 60)),
}


def losses(
    curve: str = "falling",
    spike: float = 0.0,
    shape: str = "lasting",
    *,
    steps: tuple[int, int] = (400, 200),
    noise: float = 0.0,
    interval: int = 1,
    seed: int = 0,
) -> tuple[list[LoggedLoss], list[LoggedLoss]]:
    """Logged losses before and after a switch at which the loss rises by ``spike``; 100 tokens a step."""
    t = np.arange(sum(steps))
    of_steps = CURVES[curve](t) + np.random.default_rng(seed).normal(0, noise, len(t))
    of_steps[steps[0] :] += spike * SHAPES[shape](np.arange(steps[1]))

    def logged(first: int, last: int) -> list[LoggedLoss]:
        points, done = [], first
        for step in sorted({*range(first + interval - first % interval, last + 1, interval), last}):
            strength = min(1.0, (step - 1 - first) / 40) if shape == "ramped" and first else 1.0
            points.append(LoggedLoss(step, 100 * step, float(of_steps[done:step].mean()), strength))
            done = step
        return points

    return logged(0, steps[0]), logged(steps[0], sum(steps))


def measured(before: list[LoggedLoss], after: list[LoggedLoss], to: str = "ternary") -> Transition:
    switch = before[-1]
    return measure(before, after, to_phase=1, step=switch.step, tokens=switch.tokens, precisions=("16-bit", to))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("interval", [1, 7, 10])
def test_a_switch_without_effect_has_no_spike(curve, interval):
    found = measured(*losses(curve, interval=interval))
    assert found.spike == pytest.approx(0, abs=2e-3)  # of "power", which bends
    noisy = [measured(*losses(curve, interval=interval, noise=0.05, seed=seed)) for seed in range(20)]
    assert not any(found.is_beyond_noise for found in noisy)
    assert abs(np.mean([found.spike for found in noisy])) < 0.015
    assert np.median([abs(found.spike) / found.noise for found in noisy]) < 1.5


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_a_spike_of_a_tenth_is_found_with_its_height(curve, noise):
    found = [measured(*losses(curve, 0.1, noise=noise, seed=seed)) for seed in range(10)]
    assert sum(each.is_beyond_noise for each in found) >= 9
    assert np.mean([each.spike for each in found]) == pytest.approx(0.1, abs=0.02)
    for each in found:
        assert abs(each.spike - 0.1) < max(3.5 * each.noise, 2e-3)
        assert each.peak_steps == 0 or noise


@pytest.mark.parametrize("curve", CURVES)
def test_a_phase_that_is_noisier_has_no_spike_by_that_alone(curve):
    def noisier(spike, seed):
        before, _ = losses(curve, noise=0.02, seed=seed)
        _, after = losses(curve, spike, noise=0.08, seed=seed)
        return measured(before, after)

    flat, high = ([noisier(spike, seed) for seed in range(40)] for spike in (0.0, 0.1))
    assert sum(found.is_beyond_noise for found in flat) <= 2
    assert abs(np.mean([found.spike for found in flat])) < 0.02
    assert sum(found.is_beyond_noise for found in high) >= 30


@pytest.mark.parametrize("curve", CURVES)
def test_a_spike_that_decays_and_one_at_the_end_of_a_ramp(curve):
    for seed in range(5):
        abrupt = measured(*losses(curve, 0.5, "decaying", noise=0.02, seed=seed))
        assert abrupt.spike == pytest.approx(0.5, abs=0.06)
        assert abrupt.peak_steps == 0
        ramped = measured(*losses(curve, 0.5, "ramped", noise=0.02, seed=seed))
        top = 0.5 + CURVES[curve](np.asarray([440]))[0] - CURVES[curve](np.asarray([400]))[0]
        assert ramped.is_beyond_noise
        assert ramped.spike == pytest.approx(top, abs=0.1)
        assert 25 < ramped.peak_steps < 55
        assert abs(ramped.loss_after - ramped.loss_before) < 0.05  # nothing has changed at the switch itself


def test_a_loss_that_goes_on_rising_is_highest_at_the_end():
    before, after = losses("flat")
    rising = [point._replace(loss=2 + 0.002 * (point.step - 401)) for point in after]
    found = measured(before, rising)
    assert found.loss_after == pytest.approx(2.0)
    assert found.spike == pytest.approx(0.4, abs=0.02)
    assert found.peak_steps > 190


def test_losses_that_are_logged_seldom_lie_in_the_middle_of_their_steps():
    found = measured(*losses("falling", 0.3, interval=10))
    assert found.loss_before == pytest.approx(3.0)
    assert found.loss_after == pytest.approx(3.3)
    assert found.spike == pytest.approx(0.3)


def test_short_phases_say_what_they_know():
    found = measured(*losses("falling", 0.2, steps=(12, 12)))
    assert found.spike == pytest.approx(0.2)
    assert found.noise == pytest.approx(0, abs=1e-9)
    for steps in ((1, 1), (2, 2), (8, 40), (40, 8), (11, 11)):
        unknown = measured(*losses("flat", 0.2, steps=steps))
        assert unknown.spike == pytest.approx(0.2)
        assert math.isnan(unknown.noise)
        assert not unknown.is_beyond_noise


@pytest.mark.parametrize("count", [5, 6, 8, 12, 16, 40])
def test_a_switch_early_in_a_run_whose_loss_bends_has_no_spike_by_that(count):
    t, every, found = np.arange(5 * (count + 40)), 5, []
    for seed in range(40):
        of_steps = 3.2 + 3.2 / (1 + t / 12) + np.random.default_rng(seed).normal(0, 0.05, len(t))
        points = [
            LoggedLoss(step + every, 512 * (step + every), float(of_steps[step : step + every].mean()), 1.0)
            for step in range(0, len(t), every)
        ]
        found.append(measured(points[:count], points[count:]))
    assert sum(each.is_beyond_noise for each in found) <= 1
    assert np.mean([each.loss_before for each in found]) == pytest.approx(3.2 + 3.2 / (1 + every * count / 12), abs=0.1)


def test_rows_that_are_missing_and_losses_that_are_not_finite_change_little():
    before, after = losses("falling", 0.2, noise=0.01)
    gaps = [point for point in before if not 370 < point.step < 385], [point for point in after if point.step % 5 != 3]
    holes = [
        [point._replace(loss=math.nan) if point.step % 3 == 0 else point for point in side] for side in (before, after)
    ]
    for sides in (gaps, holes):
        found = measured(*sides)
        assert found.spike == pytest.approx(0.2, abs=4 * found.noise)
        assert found.noise < 0.02


def test_an_outlier_right_at_the_switch_is_not_the_level():
    before, after = losses("flat", noise=0.01)
    before[-3] = before[-3]._replace(loss=4.0)
    assert measured(before, after).loss_before == pytest.approx(2.0, abs=0.4)
    assert measured(before[:-1], after).spike < 0.1


def test_a_loss_that_is_not_finite_any_more_has_no_height():
    before, after = losses("flat")
    lost = [point._replace(loss=math.nan) for point in after]
    for found in (measured(before, lost), measured([point._replace(loss=math.nan) for point in before], after)):
        assert math.isnan(found.spike)
        assert not found.is_beyond_noise
        assert found.recovery_steps is None


def test_recovery_is_where_the_curve_passes_the_level_before():
    before, after = losses("falling", 0.3)  # 0.005 a step: back after 60
    found = measured(before, after)
    assert found.recovery_steps in (60, 61, 62)
    assert found.recovery_tokens == 100 * found.recovery_steps
    assert found.area == pytest.approx(100 * sum(0.3 - 0.005 * t for t in range(60)), rel=0.02)
    assert measured(before, after[:50]).recovery_steps is None


def test_a_ramp_counts_as_recovered_only_with_the_quantization_fully_on():
    before, after = losses("falling", 0.05, "ramped")
    assert measured(before, after).recovery_steps >= 41
    assert measured(before, after, to="16-bit").recovery_steps < 41
    assert measured(before, after[:30]).recovery_steps is None


def watched(before: list[LoggedLoss], after: list[LoggedLoss], *, phase_ends: bool) -> list[dict[str, float]]:
    watch = SpikeWatch()
    return [
        watch.add(
            {"step": p.step, "tokens": p.tokens, "phase": phase, "precision": ("16-bit", "ternary")[phase]}
            | {"quant/strength": p.strength, "train/loss": p.loss, "train/learning_rate": 1e-3},
            phase_ends=phase_ends and p is (before, after)[phase][-1],
        )
        for phase, side in enumerate((before, after))
        for p in side
    ]


@pytest.mark.parametrize(("spike", "length"), [(0.0, 200), (0.2, 200), (0.5, 200), (2.0, 200), (0.2, 30)])
def test_a_running_job_logs_once_what_a_report_measures(spike, length):
    before, after = losses("falling", spike, noise=0.02, steps=(400, length))
    found = measured(before, after)
    rows = watched(before, after, phase_ends=True)
    (at,) = [index for index, row in enumerate(rows) if row]
    assert rows[at] == found.as_row()
    assert found.as_row().keys() >= {"transition/spike", "transition/noise", "transition/loss_before"}
    back = 200 if found.recovery_steps is None else found.recovery_steps
    assert at - len(before) + 1 == min(length, max(64, back))


def test_a_running_job_has_nothing_to_log_before_the_phase_ends_or_the_loss_is_back():
    assert not any(watched(*losses("flat", 0.5, noise=0.02), phase_ends=False))


def test_each_of_several_switches_is_measured_by_its_own_sides():
    watch, said = SpikeWatch(), []
    for phase, height in enumerate((3.0, 3.4, 3.1)):
        for step in range(100 * phase + 1, 100 * phase + 101):
            row = {"step": step, "tokens": 10 * step, "phase": phase, "precision": ("16-bit", "ternary")[phase % 2]}
            row |= {"quant/strength": 1.0, "train/loss": height, "train/learning_rate": 1e-3}
            said.append(watch.add(row, phase_ends=step % 100 == 0))
    spikes = [row["transition/spike"] for row in said if row]
    assert spikes == [pytest.approx(0.4), pytest.approx(-0.3)]
