"""Curves of a run and what a switch does to them: smoothing, thinning, spikes and recoveries."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report.history import History, PhaseSpan, Series, find_transitions, smooth
from launcher.report.plots import thin
from launcher.run.recovery import WINDOW, SpikeWatch


def history_of(losses: dict[str, list[float]], strength: list[float] | None = None, log_every: int = 1) -> History:
    """A history with one phase for each precision of `losses`; strength is that of the last phase."""
    phases, spans, values = [], [], []
    for index, (precision, part) in enumerate(losses.items()):
        first = len(values) * log_every
        values += part
        phases += [index] * len(part)
        last = len(values) * log_every
        spans.append(
            PhaseSpan(
                index=index,
                precision=precision,
                first_step=first,
                first_tokens=first * 100,
                last_step=last,
                last_tokens=last * 100,
            )
        )
    steps = np.arange(1, len(values) + 1) * log_every

    def series(column: list[float]) -> Series:
        return Series(steps=steps, tokens=steps * 100, phases=np.asarray(phases), values=np.asarray(column))

    columns = {"train/loss": series(values)}
    if strength is not None:
        columns["quant/strength"] = series([0.0] * (len(values) - len(strength)) + strength)
    return History(name="synthetic", phases=tuple(spans), series=columns)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.integers(1, 20))
def test_smoothing_is_a_weighted_mean_of_the_values_so_far(values, window):
    weights = (1 - 1 / window) ** np.arange(len(values))
    expected = [np.dot(values[: n + 1][::-1], weights[: n + 1]) / weights[: n + 1].sum() for n in range(len(values))]
    np.testing.assert_allclose(smooth(np.asarray(values), window), expected, rtol=1e-9, atol=1e-9)


def test_smoothing_leaves_a_gap_where_the_loss_is_not_a_number():
    result = smooth(np.asarray([2.0, np.nan, np.inf, 2.0]), 5)
    np.testing.assert_array_equal(result, [2.0, np.nan, np.nan, 2.0])


def test_smoothing_starts_anew_in_every_phase():
    loss = history_of({"16-bit": [3.0] * 20, "ternary": [5.0] * 20}).series["train/loss"]
    np.testing.assert_allclose(loss.smoothed(10), [3.0] * 20 + [5.0] * 20)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_ends_and_extremes_in_order(values, num_stretches):
    array = np.asarray(values)
    kept = thin(array, num_stretches)
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert len(kept) <= 2 * num_stretches + 2
    if np.isfinite(array).any():
        assert np.nanmin(array[kept]) == np.nanmin(array)
        assert np.nanmax(array[kept]) == np.nanmax(array)


def test_a_sharp_transition_with_a_known_answer():
    after = [3.5, 3.2, *[1.9] * 40]
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": after}, [1.0] * 42, log_every=5))
    smoothed = smooth(np.asarray(after), WINDOW)
    first_back = int((smoothed <= 2.0).argmax())
    assert 2 < first_back < 40
    assert (found.step, found.tokens) == (300, 30_000)
    assert (found.from_precision, found.to_precision) == ("16-bit", "ternary")
    assert found.loss_before == pytest.approx(2.0)
    assert found.noise == pytest.approx(0.0, abs=1e-12)
    assert found.spike == pytest.approx(1.5)
    assert found.peak_steps == 5
    assert found.recovery_steps == 5 * (first_back + 1)
    assert found.recovery_tokens == 100 * found.recovery_steps


def test_the_area_of_a_spike_is_what_lies_above_the_level_before_until_the_recovery():
    history = history_of({"16-bit": [2.0] * 9, "ternary": [2.5, 3.0, math.nan, 1.5, 1.0, 9.0]}, [1.0] * 6, log_every=2)
    (found,) = find_transitions(history)
    assert found.area == pytest.approx((0.5 + 1.0) * 200)  # two intervals of 200 tokens; nothing below, and none later
    assert found.recovery_steps == 10
    (going_on,) = find_transitions(history_of({"16-bit": [2.0] * 9, "ternary": [2.5, 3.0]}, [1.0] * 2))
    assert going_on.area == pytest.approx(1.5 * 100)


def rows_around_a_switch(after: list[float]) -> list[dict[str, object]]:
    losses = [2.0] * 4 + after
    return [
        {"step": n, "tokens": 10 * n, "phase": int(n > 4), "precision": "ternary" if n > 4 else "16-bit"}
        | {"quant/strength": float(n > 4), "train/loss": loss}
        for n, loss in enumerate(losses, start=1)
    ]


def test_a_running_job_logs_the_transition_once_when_the_loss_is_back():
    watch = SpikeWatch()
    said = [watch.add(row) for row in rows_around_a_switch([2.6, 2.2, 1.0, 1.0])]
    assert [bool(values) for values in said] == [False] * 6 + [True, False]
    assert said[6] == {
        "transition/loss_before": pytest.approx(2.0),
        "transition/spike": pytest.approx(0.6),
        "transition/peak_steps": 1,
        "transition/area": pytest.approx(8.0),
        "transition/recovery_steps": 3,
        "transition/recovery_tokens": 30,
    }


def test_a_running_job_logs_the_transition_where_the_phase_ends_without_recovery():
    watch = SpikeWatch()
    *rows, last = rows_around_a_switch([2.6, 2.2])
    assert not any(watch.add(row) for row in rows)
    assert watch.add(last, phase_ends=True) == {
        "transition/loss_before": pytest.approx(2.0),
        "transition/spike": pytest.approx(0.6),
        "transition/peak_steps": 1,
        "transition/area": pytest.approx(8.0),
    }


def test_a_ramp_counts_as_recovered_only_with_the_quantization_fully_on():
    ramp = [step / 30 for step in range(1, 31)]
    after = [2.0 + 0.5 * strength for strength in ramp] + [1.9] * 60
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": after}, ramp + [1.0] * 60))
    assert found.peak_steps == 30
    assert found.spike == pytest.approx(0.5)
    assert found.recovery_steps > 30

    unchanged = [2.0] * 20
    (still_ramping,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": unchanged}, ramp[:20]))
    assert still_ramping.recovery_steps is None


def test_a_transition_that_has_not_recovered_and_one_without_losses():
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 20, "ternary": [2.5, 2.4, math.nan]}, [1.0] * 3))
    assert found.recovery_steps is None
    assert found.recovery_tokens is None
    assert found.spike == pytest.approx(0.5)
    assert find_transitions(history_of({"16-bit": [2.0] * 20, "ternary": []})) == ()
