"""Curves of a run and what a switch does to them: levels, thinning, transitions."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report.history import History, PhaseSpan, Series, curves, find_transitions, read_history
from launcher.report.plots import thin
from launcher.run.metrics_log import MetricsLog, read_metrics


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


def test_a_curve_is_drawn_phase_by_phase_and_not_across_the_switch():
    history = history_of({"16-bit": [3.0] * 20, "ternary": [5.0] * 500})
    first, second = curves(history, "train/loss")
    assert (first.phase, second.phase) == (0, 1)
    np.testing.assert_allclose(first.levels, 3.0)
    np.testing.assert_allclose(second.levels, 5.0)
    assert (len(first.levels), len(second.levels)) == (20, 150)
    assert (first.steps[-1], second.steps[0]) == (19, 20)  # in the middle of their steps
    np.testing.assert_allclose(second.level_tokens, 100 * second.level_steps)


def test_a_curve_keeps_the_gap_where_the_loss_is_not_a_number():
    (curve,) = curves(history_of({"16-bit": [2.0, math.nan, 2.0, 2.0]}), "train/loss")
    np.testing.assert_array_equal(curve.values, [2, math.nan, 2, 2])
    np.testing.assert_array_equal(curve.levels, [2, 2, 2])
    (lost,) = curves(history_of({"16-bit": [math.nan, math.nan]}), "train/loss")
    assert lost.levels.size == 0


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


@pytest.mark.parametrize("resumed_at", [None, 130, 230])
@pytest.mark.parametrize("second", ["ternary", "with a teacher", "of chats", "of pairs", "after pairs"])
def test_a_running_job_measures_the_transitions_that_a_report_shows(tmp_path, second, resumed_at):
    noise = np.random.default_rng(0).normal(0, 0.01, 400).tolist()

    def row(step: int) -> dict[str, Any]:
        phase, loss = int(step > 200), 3 + noise[step - 1]
        of_pairs = second == ("after pairs", "of pairs")[phase]
        row = {"step": step, "tokens": 100 * step, "phase": phase, "precision": ("16-bit", "ternary")[phase]}
        row |= {"train/loss": loss + 0.25 * phase, "train/learning_rate": 1e-3, "quant/strength": float(phase)}
        if of_pairs:
            row |= {"train/loss": 0.7, "train/preference_loss": 0.7}
        if phase and second == "with a teacher":
            row |= {"train/loss": row["train/loss"] + 2, "train/cross_entropy": row["train/loss"]}
        return row

    def train(after: int, to: int) -> None:
        log = MetricsLog(tmp_path, step=after, phase=int(after > 200), tensorboard=False)
        for step in range(after + 1, to + 1):
            if step == 201 and second == "of chats":
                head = {"step": 200, "tokens": 20_000, "phase": 1, "precision": "ternary"}
                log.write(head | {"validation/other_text": 1.0})
            log.write(row(step), phase_ends=step in (200, 400))
        log.close()

    train(0, resumed_at or 400)
    if resumed_at:
        train(resumed_at, 400)
    logged = [
        {key: value for key, value in each.items() if key.startswith("transition/")}
        for each in read_metrics(tmp_path / "metrics.jsonl")
        if "transition/spike" in each
    ]
    shown = [found.as_row() for found in find_transitions(read_history(tmp_path / "metrics.jsonl", "run"))]
    assert logged == shown
    expected = [0.25] if second in ("ternary", "with a teacher") else []
    assert [found["transition/spike"] for found in shown] == pytest.approx(expected, abs=0.01)


def test_transitions_are_those_of_the_measurement_with_the_held_out_loss_of_that_very_step():
    history = history_of({"16-bit": [2.0] * 60, "ternary": [3.5] * 20 + [1.9] * 40}, [1.0] * 60, log_every=5)
    (found,) = find_transitions(history)
    assert (found.step, found.tokens, found.to_phase) == (300, 30_000, 1)
    assert (found.from_precision, found.to_precision) == ("16-bit", "ternary")
    assert (found.loss_before, found.spike) == (pytest.approx(2.0), pytest.approx(1.5))
    assert found.recovery_steps is not None
    assert 100 < found.recovery_steps < 200
    assert (found.bits_per_byte_before, found.bits_per_byte_after) == (None, None)

    steps, phases = np.asarray([0, 250, 300, 300, 600]), np.asarray([0, 0, 0, 1, 1])
    held_out = Series(steps=steps, tokens=steps, phases=phases, values=np.asarray([9.0, 2.5, 2.4, 2.6, 2.0]))
    (both,) = find_transitions(replace(history, series={**history.series, "validation/bits_per_byte": held_out}))
    assert (both.bits_per_byte_before, both.bits_per_byte_after) == (2.4, 2.6)
    late = replace(held_out, steps=np.asarray([0, 250, 290, 310, 600]))
    of_average = Series(**{**vars(held_out), "values": held_out.values + 0.5})
    series = {**history.series, "validation/bits_per_byte": held_out, "validation/bits_per_byte_averaged": of_average}
    (averaged,) = find_transitions(replace(history, series=series), {1})
    assert averaged.bits_per_byte_before == both.bits_per_byte_before + 0.5
    assert averaged.bits_per_byte_after == both.bits_per_byte_after
    (neither,) = find_transitions(replace(history, series={**history.series, "validation/bits_per_byte": late}))
    assert (neither.bits_per_byte_before, neither.bits_per_byte_after) == (None, None)


def test_there_is_no_transition_without_losses_on_both_sides():
    assert find_transitions(history_of({"16-bit": [2.0] * 20, "ternary": []})) == ()
    assert find_transitions(replace(history_of({"16-bit": [2.0], "ternary": [2.0]}), series={})) == ()


def test_the_loss_of_a_phase_with_a_teacher_is_the_cross_entropy(tmp_path):
    """As before and after it; the terms of the teacher are of another size."""
    about = {"tokens": 0, "train/learning_rate": 1e-3}
    rows = [
        {"step": 1, **about, "phase": 0, "precision": "16-bit", "train/loss": 3.0},
        {"step": 2, **about, "phase": 1, "precision": "ternary", "train/loss": 9.0, "train/cross_entropy": 3.5},
        {"step": 3, **about, "phase": 1, "precision": "ternary"},  # not finite
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = read_history(path, "taught").series["train/loss"].values
    assert losses.tolist() == pytest.approx([3.0, 3.5, math.nan], nan_ok=True)


def test_telemetry_takes_no_losses_away(tmp_path):
    """It is collected after the losses of later steps, and after a checkpoint."""
    about = {"tokens": 0, "phase": 0, "precision": "ternary"}
    rows = [
        *({"step": step, **about, "train/learning_rate": 1e-3, "train/loss": float(step)} for step in (10, 20)),
        *({"step": step, **about, "quant/since_step": 1, "quant/scale": 0.1} for step in (11, 12, 16)),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(path, "late")
    assert history.series["train/loss"].values.tolist() == [10.0, 20.0]
    assert history.series["quant/scale"].steps.tolist() == [11, 12, 16]
    assert history.phases[0].last_step == 20
