"""Schedules and peaks of phases: each curve is that of a run by itself."""

import pytest
from plans import plan_of, refusal

from launcher.errors import ConfigError
from launcher.plan.course import Course
from launcher.plan.events import events
from launcher.plan.table import describe
from launcher.run.changes import check_strength, schedule_note

PHASES = "phases=[{precision: 16-bit, steps: 4}, {precision: ternary, steps: 6}, {precision: ternary, steps: 5}]"
SHAPE = "shape: cosine, warmup_steps: 1, final_fraction: 0.2"
OWN = (PHASES, "phases.1.learning_rate=3e-5", f"phases.1.schedule={{{SHAPE}}}")


def rates(*overrides: str) -> list[float]:
    plan = plan_of(*overrides)
    return [plan.learning_rate_at(step) for step in range(plan.total_steps)]


def alone(steps: int, rate: str, schedule: str) -> list[float]:
    """The rates of a run of one phase."""
    phases = f"phases=[{{precision: 16-bit, steps: {steps}}}]"
    return rates(phases, f"optimizer.learning_rate={rate}", f"schedule={{{schedule}}}")


def test_a_schedule_of_a_phase_is_that_of_a_run_by_itself() -> None:
    """It holds for the phases after it too, and the schedule before it ends where it begins."""
    first = alone(4, "1e-2", "shape: linear, warmup_steps: 2, final_fraction: 0.0")
    assert rates(*OWN) == first + alone(11, "3e-5", SHAPE)
    third = "phases.2.schedule={shape: wsd, decay_fraction: 0.4, decay: 1-sqrt}"
    assert rates(*OWN, third) == first + alone(6, "3e-5", SHAPE) + alone(
        5, "3e-5", "shape: wsd, decay_fraction: 0.4, decay: 1-sqrt"
    )


def test_a_peak_of_a_phase_leaves_the_schedule_as_it_is() -> None:
    usual, other = rates(PHASES), rates(PHASES, "phases.1.learning_rate=5e-3")
    assert other == usual[:4] + [rate / 2 for rate in usual[4:]]
    back = rates(PHASES, "phases.1.learning_rate=5e-3", "phases.2.learning_rate=1e-2")
    assert back == other[:10] + usual[10:]


def test_a_schedule_of_a_phase_alone_keeps_the_peak() -> None:
    own = rates(PHASES, f"phases.2.schedule={{{SHAPE}}}")
    assert own[10:] == alone(5, "1e-2", SHAPE)
    assert own[:10] == rates("phases=[{precision: 16-bit, steps: 4}, {precision: ternary, steps: 6}]")


def test_a_restart_and_a_new_peak_within_the_schedule_of_a_phase() -> None:
    expected = rates(*OWN)[:10] + alone(5, "1e-5", SHAPE)
    assert rates(*OWN, "phases.2.transition.schedule=restart", "phases.2.learning_rate=1e-5") == expected


def test_a_horizon_counts_from_where_the_schedule_begins() -> None:
    assert rates(*OWN, "phases.1.schedule.horizon_steps=7")[4:] == (
        alone(7, "3e-5", SHAPE) + [pytest.approx(0.2 * 3e-5)] * 4
    )
    assert rates(*OWN, "phases.1.schedule.horizon_steps=20")[4:] == alone(20, "3e-5", SHAPE)[:11]


def test_a_decay_from_a_later_phase_of_the_schedule() -> None:
    own = rates(*OWN, "phases.1.schedule.decay_from_phase=2")
    assert own[4:10] == [3e-5] * 6
    assert own[10:] == alone(5, "3e-5", SHAPE.replace("warmup_steps: 1, ", ""))


def test_what_is_not_of_the_curve_stays() -> None:
    plan = plan_of(*OWN, "optimizer.weight_decay_until=ternary", "phases.1.transition.rewarm_tokens=384")
    assert plan.weight_decay_end == 4
    assert [plan.learning_rate_at(step) / rate for step, rate in enumerate(rates(*OWN))] == [1.0] * 4 + [0.5] + [
        1.0
    ] * 10


def test_the_plan_names_schedules_and_peaks() -> None:
    drop = "phases.2.schedule={shape: two-stage, drop_at: 0.4}"
    what: dict[int, list[str]] = {}
    for event in events(plan_of(*OWN, drop)):
        what.setdefault(event["step"], []).append(event["what"])
    assert "the learning rate begins a schedule of its own: cosine from 3e-05, until step 10" in what[4]
    assert "the learning rate begins a schedule of its own: two-stage from 3e-05, until step 15" in what[10]
    assert what[12] == ["the learning rate drops to its second stage"]
    assert [phase["peak_learning_rate"] for phase in describe(plan_of(*OWN))["phases"]] == [1e-2, 3e-5, 3e-5]
    restart = "phases.2.transition.schedule=restart"
    for overrides in ([], [restart]):
        found = events(plan_of(PHASES, "phases.2.learning_rate=1e-3", *overrides))
        [peak] = [event for event in found if "peak" in event["what"]]
    assert peak == {"step": 10, "what": "the learning rate has another peak: 0.001"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["phases.1.learning_rate=0"], "phases.1.learning_rate: is 0.0; must be above 0"),
        (
            ["phases.0.learning_rate=1e-3"],
            "phases.0.learning_rate: is given, but the first phase begins with the run's; set optimizer.learning_rate "
            "instead",
        ),
        (
            ["phases.0.schedule={}"],
            "phases.0.schedule: is given, but the first phase begins with the run's; set schedule instead",
        ),
        (
            ["phases.1.schedule={}", "phases.1.transition.schedule=restart"],
            "phases.1.transition.schedule: is restart, but the phase begins a schedule of its own; leave it out",
        ),
        (
            ["phases.2.schedule={warmup_steps: 5}"],
            "phases.2.schedule.warmup_steps: 5 leaves nothing of the 5 steps from step 10 on; 4 at most",
        ),
        (
            ["phases.1.schedule={warmup_steps: 6}", "phases.2.schedule={}"],
            "phases.1.schedule.warmup_steps: 6 leaves nothing of the 6 steps from step 4 on; 5 at most",
        ),
        (
            ["phases.1.schedule={}", "schedule.warmup_steps=4"],
            "schedule.warmup_steps: 4 leaves nothing of the 4 steps from step 0 on; 3 at most",
        ),
        (
            ["phases.1.schedule.decay_from_phase=1"],
            "phases.1.schedule.decay_from_phase: is 1; must be a later phase that follows this schedule: choose 2",
        ),
        (
            ["schedule.decay_from_phase=2", "phases.1.schedule={}"],
            "schedule.decay_from_phase: is 2; must be a later phase that follows this schedule: there is none, so "
            "leave it out",
        ),
        (
            ["phases.1.schedule={horizon_steps: 6}", "phases.2.transition.schedule=restart"],
            "phases.2.transition.schedule: is restart at step 10, where phases.1.schedule.horizon_steps 6 leaves "
            "nothing; set it above 6",
        ),
        (
            ["phases.1.schedule={decay: 1-sqrt}"],
            "phases.1.schedule.decay: is 1-sqrt, but has no effect, because phases.1.schedule.shape is cosine, not "
            "wsd; leave it out",
        ),
        (
            ["phases.1.schedule={shape: wsd, decay_fraction: 1e-5}"],
            "phases.1.schedule.decay_fraction: is 1e-05; must be 0.0001 or more; the default is 0.2",
        ),
        (["phases.1.schedule.warmup_steps=-1"], "phases.1.schedule.warmup_steps: is -1; must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], expected: str) -> None:
    assert refusal(PHASES, *overrides) == expected


def test_a_phase_with_a_schedule_of_its_own_extends_a_run_without_a_jump() -> None:
    two = "phases=[{precision: 16-bit, steps: 4}, {precision: ternary, steps: 6}]"
    before, longer, own = plan_of(two), plan_of(PHASES), plan_of(PHASES, f"phases.2.schedule={{{SHAPE}}}")
    assert schedule_note(before, own, 10) == schedule_note(before, own, 7) == []
    [note] = schedule_note(before, longer, 10)
    assert "set schedule.horizon_steps=10; to warm up again, add a phase with a schedule of its own" in note
    [note] = schedule_note(plan_of(*OWN), plan_of(*OWN, "phases.2.steps=50"), 15)
    assert "set phases.1.schedule.horizon_steps=11;" in note


def test_factors_that_rise_with_the_length_of_a_run_are_told() -> None:
    two = "phases=[{{precision: 16-bit, steps: 4}}, {{precision: ternary, steps: {}}}]"
    own = "optimizer.ternary_learning_rate_factor={start: 2.0, end: 1.0}"
    before, now = plan_of(two.format(6), own), plan_of(two.format(20), own)
    _, factor = schedule_note(before, now, 10)
    assert "the factor of quantized layers on the learning rate was 1.17 in step 10 and is 1.7 in step 11" in factor
    until = "optimizer.weight_decay_until=0.5"
    _, decay = schedule_note(plan_of(two.format(6), until), plan_of(two.format(20), until), 10)
    assert "the factor on weight decay was 0 in step 10 and is 1 in step 11" in decay


def test_a_longer_phase_does_not_turn_quantization_back() -> None:
    def course(steps: int, ramp: str = "{fraction: 0.5}") -> Course:
        second = f"{{precision: ternary, steps: {steps}, transition: {{ramp: {ramp}}}}}"
        return plan_of(f"phases=[{{precision: 16-bit, steps: 4}}, {second}]")

    before = course(4)
    assert before.strengths_at(7)[0][0] == 1
    check_strength(before, course(12, "{steps: 2}"), 8)
    check_strength(before, course(12), 4)  # nothing of the phase is trained
    with pytest.raises(ConfigError) as caught:
        check_strength(before, course(12), 8)
    assert str(caught.value) == (
        "phases.1.transition.ramp: quantization would go back from strength 1 in step 8 to 0.667 in step 9; keep the "
        "ramp as it was with phases.1.transition.ramp.steps=2 in place of a fraction"
    )


def test_the_last_phase_reaches_full_strength_and_no_warm_up_is_longer_than_its_phase() -> None:
    two = "phases=[{{precision: 16-bit, steps: 4}}, {{precision: ternary, steps: 4, transition: {}}}]"
    assert plan_of(two.format("{ramp: {steps: 3}}")).strengths_at(7)[0][0] == 1
    for ramp in ("{steps: 4}", "{fraction: 1.0}", "{steps: 1, delay_steps: 3}"):
        assert "phases.1.transition.ramp: is as long as the phase, 4 steps" in refusal(two.format(f"{{ramp: {ramp}}}"))
    told = refusal(two.format("{rewarm_tokens: 1000000000}"))
    assert told.startswith("phases.1.transition.rewarm_tokens: 1000000000 come to ")
    assert told.endswith("longer than the phase's 4")
