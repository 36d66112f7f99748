"""What a configuration resolves to on a number of ranks."""

import math
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from plans import phases, plan_of, refusal, steps_of

from launcher.config.file import load_config
from launcher.errors import ConfigError
from launcher.plan.events import events
from launcher.plan.memory import checkpoint_bytes, memory_bytes_per_rank, offloaded_bytes_per_rank
from launcher.plan.plan import make_plan
from launcher.plan.table import describe
from launcher.process.ranks import ALONE
from launcher.training.record import summary
from model.size import activation_bytes
from quant.config import QuantConfig

CONFIGS = ROOT / "configs"

PARAMETERS = 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16  # embedding, blocks with their norms, last norm
LINEAR_PARAMETERS = 2 * (4 * 16 * 16 + 3 * 16 * 24)


# Batches


def test_batches_resolve():
    plan = plan_of(world_size=4)
    assert (plan.batch.full, plan.most_micro_batches, plan.tokens_at(0)) == (24, 3, 192)
    in_tokens = plan_of("training.global_batch_sequences=null", "training.global_batch_tokens=192", world_size=4)
    assert (in_tokens.batch.full, in_tokens.most_micro_batches, in_tokens.tokens_at(0)) == (24, 3, 192)


def test_what_does_not_divide_lists_what_would():
    message = refusal(world_size=8)
    assert message == (
        "training.global_batch_sequences: 24 sequences do not divide into micro-batches of 2 on 8 ranks; "
        "training.micro_batch_sequences of 1, 3 would"
    )
    in_tokens = refusal("training.global_batch_sequences=null", "training.global_batch_tokens=192", world_size=8)
    assert in_tokens.startswith("training.global_batch_tokens: 24 sequences do not divide")
    assert "a multiple of 10 sequences would, such as 30" in refusal(world_size=5)


@given(sequences=st.integers(1, 120), micro=st.integers(1, 12), world_size=st.integers(1, 16))
def test_every_batch_resolves_or_names_values_that_do(sequences, micro, world_size):
    tokens = ["training.global_batch_sequences=null", f"training.global_batch_tokens={8 * sequences}"]

    def plan(sequences, micro):
        overrides = [*tokens[:1], f"training.global_batch_tokens={8 * sequences}"]
        return plan_of(*overrides, f"training.micro_batch_sequences={micro}", world_size=world_size)

    try:
        resolved = plan(sequences, micro)
    except ConfigError as error:
        told = str(error)
    else:
        assert resolved.most_micro_batches * micro * world_size == sequences
        return
    assert sequences % (micro * world_size)
    if fitting := re.search(r"micro_batch_sequences of ([\d, ]+) would$", told):
        listed = [int(number) for number in fitting[1].split(", ")]
        assert listed == [n for n in range(1, sequences + 1) if sequences % (n * world_size) == 0]
        assert all(plan(sequences, n).most_micro_batches for n in listed)
    else:
        assert sequences % world_size
        assert plan(int(re.search(r"such as (\d+)$", told)[1]), micro).most_micro_batches


def test_replicas_must_divide_the_ranks():
    told = "engine.replicas: 3 does not divide 4 ranks; 1, 2, 4 do"
    assert refusal("engine.replicas=3", world_size=4) == told
    assert plan_of("engine.replicas=2", world_size=4).world_size == 4


# Phases


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [
        (("steps: 4", "steps: 6"), None, [4, 6]),
        (("tokens: 192", "tokens: 193"), None, [1, 2]),
        (("tokens: 1", "steps: 1"), None, [1, 1]),
        (("fraction: 0.2", "fraction: 0.8"), "total_steps=10", [2, 8]),
        (("fraction: 0.2", "fraction: 0.8"), "total_tokens=1920", [2, 8]),
        (("fraction: 0.2", "fraction: 0.8"), "total_tokens=1921", [2, 9]),
        (("fraction: 0.5", "fraction: 0.5"), "total_steps=5", [2, 3]),
        (("fraction: 0.1", "fraction: 0.2", "fraction: 0.7"), "total_steps=10", [1, 2, 7]),
        (("steps: 3", "fraction: 0.7"), "total_steps=10", [3, 7]),
        (("fraction: 0.2", "fraction: rest"), "total_steps=10", [2, 8]),
        (("fraction: rest", "fraction: 0.5"), "total_steps=5", [3, 2]),
        (("fraction: 0.3", "fraction: rest", "fraction: 0.3"), "total_tokens=1921", [3, 4, 4]),
        (("steps: 3", "fraction: rest", "tokens: 193"), "total_steps=10", [3, 5, 2]),
        (("fraction: rest", "steps: 3", "fraction: 0.2"), "total_steps=10", [5, 3, 2]),
    ],
)
def test_lengths_resolve(lengths, total, expected):
    plan = plan_of("schedule.warmup_steps=0", *phases(*lengths), *([f"training.{total}"] if total else []))
    assert steps_of(plan) == expected
    assert plan.total_steps == sum(expected)
    assert [phase.start for phase in plan.phases] == [sum(expected[:index]) for index in range(len(expected))]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(30, 10**6))
def test_fractions_of_one_in_sum_make_the_whole_run(weights, total_steps):
    fractions = [f"fraction: {weight / sum(weights)}" for weight in weights]
    plan = plan_of(*phases(*fractions), f"training.total_steps={total_steps}")
    assert plan.total_steps == total_steps
    for steps, weight in zip(steps_of(plan), weights, strict=True):
        assert abs(steps - total_steps * weight / sum(weights)) <= 1


@pytest.mark.parametrize(
    ("lengths", "total", "told"),
    [
        (("steps: 3", "fraction: 0.5"), "total_steps=10", "phases: have 8 steps together, which are not the 10 steps"),
        (("tokens: 576", "fraction: 0.8"), "total_tokens=1920", "phases: have 11 steps together, which are not the 10"),
        (("steps: 10", "fraction: rest"), "total_steps=10", "phases.1.fraction: is rest, but the 10 steps of the oth"),
        (("fraction: rest", "steps: 12"), "total_steps=10", "phases.0.fraction: is rest, but the 12 steps of the oth"),
    ],
)
def test_lengths_that_do_not_make_the_whole_run_are_refused(lengths, total, told):
    assert refusal("schedule.warmup_steps=0", *phases(*lengths), f"training.{total}").startswith(told)


def test_a_fraction_of_no_step_is_refused():
    message = refusal(*phases("fraction: 0.01", "fraction: 0.99"), "training.total_steps=10")
    assert message == "phases.0.fraction: 0.01 of 10 steps is less than a step"


def test_phase_of_every_step():
    plan = plan_of()
    assert [plan.phase_of(step).index for step in range(10)] == [0] * 4 + [1] * 6
    assert [phase.quantization for phase in plan.phases] == [None, QuantConfig()]


# Learning rate


def rates(plan):
    return [plan.learning_rate_at(step) for step in range(plan.total_steps)]


def test_schedule_continues_over_a_transition():
    expected = (1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)
    assert rates(plan_of()) == pytest.approx([0.01 * factor for factor in expected])


def test_schedule_restarts_with_its_warmup_over_what_remains():
    plan = plan_of("phases.1.transition.schedule=restart")
    expected = (1 / 2, 1, 1, 7 / 8, 1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4)
    assert rates(plan) == pytest.approx([0.01 * factor for factor in expected])


def test_rewarm_scales_the_curve_that_goes_on():
    plain, rewarmed = rates(plan_of()), rates(plan_of("phases.1.transition.rewarm_tokens=577"))  # 3 steps and a token
    assert rewarmed[:4] == plain[:4]
    shares = [now / before for now, before in zip(rewarmed, plain, strict=True)]
    assert shares == pytest.approx([1, 1, 1, 1, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1])
    assert rewarmed[8:] == plain[8:]


def test_horizon_behind_the_end_cuts_the_curve():
    longer = rates(plan_of("schedule.horizon_steps=18"))
    assert longer[-1] == pytest.approx(0.01 * (1 - 7 / 16))
    shorter = rates(plan_of("schedule.horizon_steps=6"))
    assert shorter[6:] == [0.0] * 4


def test_warmup_must_leave_something():
    assert refusal("schedule.warmup_steps=10") == (
        "schedule.warmup_steps: 10 leaves nothing of the 10 steps from step 0 on; 9 at most"
    )
    assert plan_of("schedule.warmup_steps=9").learning_rate_at(8) == 0.01


def test_warmup_must_leave_something_of_what_a_restart_leaves():
    restart = "phases.1.transition.schedule=restart"
    assert plan_of("schedule.warmup_steps=5", restart).learning_rate_at(8) == 0.01
    assert refusal("schedule.warmup_steps=6", restart) == (
        "schedule.warmup_steps: 6 leaves nothing of the 6 steps from step 4 on; 5 at most"
    )
    assert refusal("schedule.horizon_steps=4", restart) == (
        "phases.1.transition.schedule: is restart at step 4, where schedule.horizon_steps 4 leaves nothing; "
        "set it above 4"
    )


def test_a_lower_rate_for_a_while():
    plain, dropped = (
        rates(plan_of()),
        rates(plan_of("phases.1.transition.learning_rate_drop={factor: 0.5, tokens: 193}")),
    )
    assert [now / before for now, before in zip(dropped, plain, strict=True)] == [1] * 4 + [0.5] * 2 + [1] * 4


def test_cool_down_that_begins_with_a_phase():
    plan = plan_of("schedule.decay_from_phase=1")
    assert rates(plan) == pytest.approx([0.005, 0.01, 0.01, 0.01, *[0.01 * (1 - step / 6) for step in range(6)]])
    told = "schedule.decay_from_phase: is 1, which begins at step 4; must lie after the warm-up's"
    assert refusal("schedule.decay_from_phase=1", "schedule.warmup_steps=5").startswith(told)
    assert refusal("schedule.decay_from_phase=1", "schedule.horizon_steps=4").startswith(told)
    assert "the last of the 2 phases is 1" in refusal("schedule.decay_from_phase=2")
    restart = refusal("schedule.decay_from_phase=1", "phases.1.transition.schedule=restart")
    assert restart.startswith("phases.1.transition.schedule: is restart")


def test_weight_decay_ends_and_ternary_layers_have_their_own_rate():
    plan = plan_of("optimizer.weight_decay_until=0.25", "optimizer.ternary_learning_rate_factor=1.5")
    assert [plan.decay_factor_at(step) for step in range(10)] == [1, 1] + [0] * 8
    assert [plan.ternary_factor_at(step) for step in range(10)] == [1] * 4 + [1.5] * 6
    in_16_bits = plan_of("optimizer.weight_decay_until=ternary")
    assert [in_16_bits.decay_factor_at(step) for step in range(10)] == [1] * 4 + [0] * 6
    assert {plan_of().decay_factor_at(step) for step in range(10)} == {plan_of().ternary_factor_at(9)} == {1}
    both = "phases.0={precision: ternary, steps: 4, quantization: {include: mlp}}"
    assert "must be the same in each; there are 2 different ones" in refusal(
        "optimizer.ternary_learning_rate_factor=2", both
    )
    none = "phases.1.precision=16-bit"
    assert "no phase is ternary" in refusal("optimizer.weight_decay_until=ternary", none)
    assert "no phase is ternary" in refusal("optimizer.ternary_learning_rate_factor=2", none)


# Strength and data


def test_strengths_of_blocks_and_of_activations():
    ramps = "phases.1.transition={ramp: {steps: 4, order: back-to-front}, activation_ramp: {steps: 2, delay_steps: 1}}"
    plan = plan_of(ramps)
    assert plan.strengths_at(3) == ([0, 0], [0, 0])
    assert [plan.strengths_at(step)[0] for step in range(4, 9)] == [[0, 0], [0, 0.5], [0, 1], [0.5, 1], [1, 1]]
    assert [plan.strengths_at(step)[1] for step in range(4, 9)] == [[0, 0], [0, 0], [0.5, 0.5], [1, 1], [1, 1]]
    assert [plan.strength_at(step) for step in range(4, 9)] == [0, 0.25, 0.5, 0.75, 1]
    assert plan.activation_strength_at(6) == 0.5
    together = plan_of("phases.1.transition.ramp.steps=3")
    assert all(weights == activations for weights, activations in map(together.strengths_at, range(10)))


def test_strengths_in_a_measured_order():
    ramps = "phases.1.transition={ramp: {steps: 4, order: sensitivity}, activation_ramp: {steps: 2}}"
    plan = plan_of(ramps)
    assert [plan.strengths_at(step, (1, 0))[0] for step in range(4, 9)] == [[0, 0], [0, 0.5], [0, 1], [0.5, 1], [1, 1]]
    assert [plan.strengths_at(step, (1, 0))[1] for step in range(4, 7)] == [[0, 0], [0.5, 0.5], [1, 1]]
    assert [plan.strength_at(step) for step in range(4, 9)] == [0, 0.25, 0.5, 0.75, 1]
    assert plan.phases[1].transition.measures_order
    assert not plan_of("phases.1.transition.ramp.steps=4").phases[1].transition.measures_order


def test_the_mean_strength_of_equal_blocks_is_theirs_exactly():
    plan = plan_of("model.num_layers=3", "phases.1.transition.ramp={shape: tanh, steps: 5}")
    assert all({plan.strength_at(step)} == set(plan.strengths_at(step)[0]) for step in range(10))


def test_both_ramps_must_fit_into_the_phase():
    late = "phases.1.transition.activation_ramp={steps: 4, delay_steps: 3}"
    told = "phases.1.transition.activation_ramp.steps: is 4 and 3 of delay_steps, longer than the phase's 6"
    assert refusal(late) == told
    assert "activations is none" in refusal(late, "phases.1.quantization={activations: none}")
    assert refusal("phases.0.transition={ramp: {delay_steps: 1}}").startswith("phases.0.transition.ramp: is given for")


ROLLBACK = "phases.1.transition.rollback={after_tokens: 193, ramp_factor: 2.0, max_attempts: 1}"


def test_rolled_back_ramps_are_longer():
    tree = [ROLLBACK, "phases.1.transition.ramp={steps: 1, delay_steps: 1}", "phases.1.steps=20"]
    config = plan_of(*tree).config
    ramps = [make_plan(config, 1, {1: attempts} if attempts else {}).phases[1].transition.ramp for attempts in range(3)]
    assert [(ramp.steps, ramp.delay_steps) for ramp in ramps] == [(1, 1), (2, 2), (4, 4)]
    assert plan_of(*tree).rollback_step(plan_of(*tree).phases[1]) == 4 + 2 + 2
    assert plan_of(*tree).rollback_step(plan_of(*tree).phases[0]) is None


def test_a_rolled_back_switch_without_a_ramp_gets_one():
    config = plan_of(ROLLBACK).config
    lengths = [make_plan(config, 1, {1: attempts}).phases[1].transition.ramp.steps for attempts in range(3)]
    assert lengths == [0, 2, 4]


def test_the_last_attempt_must_fit_into_its_phase():
    assert plan_of(ROLLBACK, "phases.1.transition.ramp.steps=2").total_steps == 10
    assert refusal(ROLLBACK, "phases.1.transition.ramp.steps=3") == (
        "phases.1.transition.rollback: the ramp of its last attempt and after_tokens come to 8 steps, "
        "longer than the phase's 6"
    )
    begins = ["checkpoint={start_from: there, start_phase: 1}", ROLLBACK]
    assert "needs the loss before the switch" in refusal(*begins)


def test_events_tell_what_happens_when():
    plan = plan_of(
        "phases.1.transition={optimizer: rescale, ramp: {steps: 4, order: front-to-back}, "
        "activation_ramp: {steps: 0, delay_steps: 2}, learning_rate_drop: {factor: 0.5, tokens: 192}}",
        "optimizer={learning_rate: 0.01, weight_decay_until: 0.5, ternary_learning_rate_factor: 2.0}",
        "schedule.decay_from_phase=1",
    )
    assert [f"{event['step']} {event['what']}" for event in events(plan)] == [
        "4 the learning rate begins to decay, until step 10",
        "4 the optimizer's moments are rescaled by a measured factor",
        "4 quantization of the weights ramps up: linear, front-to-back, full strength from step 8",
        "4 quantized layers have 2 times the learning rate, until step 10",
        "4 the learning rate is multiplied by 0.5, until step 5",
        "5 weight decay ends (0.1 before)",
        "6 quantization of the activations ramps up: full strength from step 6",
    ]
    [soft] = events(plan_of("phases.1.transition.ramp={steps: 4, order: sensitivity, rounding: softmax}"))
    assert soft["what"] == (
        "quantization ramps up: linear, by sensitivity, softmax rounding, full strength from step 8"
    )
    assert events(plan_of("schedule.shape=two-stage"))[-1]["what"] == "the learning rate drops to its second stage"
    assert [event["step"] for event in events(plan_of("phases.1.steps=20", ROLLBACK))] == [4, 6]


def test_strength_over_all_phases():
    plan = plan_of(
        "phases=[{precision: 16-bit, steps: 2}, {precision: ternary, steps: 5, transition: {ramp: {steps: 4}}}, "
        "{precision: 16-bit, steps: 2}, {precision: ternary, steps: 2}]"
    )
    strengths = [plan.strength_at(step) for step in range(plan.total_steps)]
    assert strengths == [0, 0, 0, 0.25, 0.5, 0.75, 1, 0, 0, 1, 1]


def test_a_ramp_must_fit_into_its_phase():
    ramp = "phases.1.transition.ramp.steps"
    assert plan_of(f"{ramp}=5").strength_at(8) == 4 / 5
    assert refusal(f"{ramp}=7") == "phases.1.transition.ramp.steps: is 7, longer than the phase's 6"
    by_fraction = [*phases("fraction: 0.5", "fraction: 0.5"), "training.total_steps=10"]
    assert refusal(*by_fraction, f"{ramp}=6") == "phases.1.transition.ramp.steps: is 6, longer than the phase's 5"


def test_a_ramp_of_a_share_of_its_phase_is_that_ramp_in_steps():
    ramps = "phases.1.transition={ramp: {fraction: 0.5}, activation_ramp: {fraction: 0.8, delay_steps: 0}}"
    in_steps = "phases.1.transition={ramp: {steps: 3}, activation_ramp: {steps: 5}}"
    assert plan_of(ramps).phases == plan_of(in_steps).phases
    assert refusal(ramps.replace("delay_steps: 0", "delay_steps: 2")) == (
        "phases.1.transition.activation_ramp.steps: is 5 and 2 of delay_steps, longer than the phase's 6"
    )


def test_data_goes_on_or_restarts():
    positions = [plan_of().first_sequence_at(step) for step in range(10)]
    assert positions == [24 * step for step in range(10)]
    again = plan_of("phases.1.transition.data=restart")
    assert [again.first_sequence_at(step) for step in range(10)] == [0, 24, 48, 72, 0, 24, 48, 72, 96, 120]


A, B, AB = "[{path: shards}]", "[{path: other}]", "[{path: shards}, {path: other, weight: 3}]"
PATHS = {A: ["shards"], B: ["other"], AB: ["shards", "other"]}


def test_each_mixture_goes_on_where_it_stopped():
    """Five phases of two steps of 24 rows; the position counts the steps of the phase's mixture alone."""

    def positions(*mixtures, restarts=()):
        listed = [f"{{precision: 16-bit, steps: 2{'' if each is None else f', sources: {each}'}}}" for each in mixtures]
        plan = plan_of(
            f"phases=[{', '.join(listed)}]", *(f"phases.{index}.transition.data=restart" for index in restarts)
        )
        paths = [[source.path for source in plan.data_at(step).sources] for step in (0, 2, 4, 6, 8)]
        return paths, [plan.first_sequence_at(step) // 24 for step in range(11)]

    assert positions(*[None] * 5) == ([["shards"]] * 5, list(range(11)))
    mixed = [A, B, AB, A, B]
    assert positions(*mixed) == ([PATHS[each] for each in mixed], [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 4])
    # A phase without sources has those of the phase before, not those of the run.
    assert positions(None, B, None, A, None) == (
        [PATHS[each] for each in (A, B, B, A, A)], [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6]
    )  # fmt: skip
    # A restart is one of the phase's own mixture.
    assert positions(*mixed, restarts=(3,))[1] == [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4]
    assert positions(*mixed, restarts=(1,))[1] == positions(*mixed)[1]


def test_a_phase_has_its_sequence_length_until_another_one():
    three = "phases=[{precision: 16-bit, steps: 2}, {precision: 16-bit, steps: 3, sequence_length: 4}, "
    three += "{precision: ternary, steps: 3}, {precision: ternary, steps: 2, sequence_length: 8}]"
    plan = plan_of(three)
    assert [plan.length_at(step) for step in range(10)] == [8, 8, 4, 4, 4, 4, 4, 4, 8, 8]
    assert [plan.tokens_at(step) for step in range(10)] == [192] * 10
    assert plan.total_flops == sum(192 * plan.flops_per_token_at(step) for step in range(10))
    # A warm-up of the length counts where it is shorter.
    warm = plan_of(three, "training.sequence_warmup=[{length: 2, until_tokens: 576}]", "phases.0.sequence_length=4")
    assert [warm.length_at(step) for step in range(10)] == [2, 2, 2, 4, 4, 4, 4, 4, 8, 8]
    assert [step for step in range(10) if warm.changes_size_at(step)] == [3, 8]


# Sizes


def test_ternary_parameters_are_those_that_any_phase_quantizes():
    def found(*includes, first="16-bit"):
        ternary = [f"{{precision: ternary, steps: 3, quantization: {{include: '{each}'}}}}" for each in includes]
        phases = ", ".join([f"{{precision: {first}, steps: 3}}", *ternary])
        plan = plan_of(f"phases=[{phases}]")
        written = summary(plan, ALONE, SimpleNamespace(elapsed_seconds=1.0))["num_ternary_parameters"]
        assert describe(plan)["ternary_parameters"] == written
        return written

    down, gate = "down_proj$", "gate_proj$"
    assert found() == 0
    assert found("layers.0.+_proj$") == LINEAR_PARAMETERS / 2
    assert found(down) == found(gate) == found(down, down) == found(down, gate) / 2 > 0
    assert found(down, first="ternary") == LINEAR_PARAMETERS


def test_the_numbers_of_a_plan_by_hand():
    numbers = describe(plan_of("checkpoint.interval_steps=3", world_size=4))
    assert numbers["parameters"] == PARAMETERS == 5456
    assert numbers["ternary_parameters"] == LINEAR_PARAMETERS == 4352
    # 6 for each weight in a product, the tied head among them; attention: 6 * layers * heads * width * (tokens + 1).
    assert numbers["flops_per_token"] == 6 * (4352 + 64 * 16) + 6 * 2 * 2 * 8 * 9 == 33_984
    assert numbers["total_flops"] == 33_984 * 192 * 10
    assert (numbers["ranks"], numbers["micro_batches_per_step"], numbers["sequences_per_step"]) == (4, 3, 24)
    assert (numbers["tokens_per_step"], numbers["total_steps"], numbers["total_tokens"]) == (192, 10, 1920)
    about = {"objective": "next-token", "peak_learning_rate": 0.01}
    assert numbers["phases"] == [
        {"precision": "16-bit", **about, "first_step": 0, "steps": 4, "tokens": 768, "is_trained": True},
        {"precision": "ternary", **about, "first_step": 4, "steps": 6, "tokens": 1152, "is_trained": True},
    ]
    assert numbers["checkpoint_bytes"] == checkpoint_bytes(plan_of()) == 12 * 5456
    assert numbers["total_bytes_per_rank"] == pytest.approx(sum(numbers["bytes_per_rank"].values()), abs=2)


@pytest.mark.parametrize(
    ("interval", "keep_last", "written", "kept"),
    [(None, 2, 2, 2), (3, 2, 5, 4), (3, 0, 5, 5), (2, 2, 5, 4), (100, 2, 2, 2), (1, 3, 10, 5), (None, 0, 2, 2)],
)
def test_number_of_checkpoints(interval, keep_last, written, kept):
    """Ends of phases (4 and 10) are milestones and stay; of the others the newest `keep_last`."""
    overrides = [f"checkpoint.interval_steps={interval or 'null'}", f"checkpoint.keep_last={keep_last}"]
    numbers = describe(plan_of(*overrides, "checkpoint.interval_minutes=null"))
    assert (numbers["checkpoints_written"], numbers["checkpoints_kept"]) == (written, kept)
    by_time = describe(plan_of(*overrides))  # every half hour as well, of which the newest are kept
    assert by_time["checkpoints_kept"] == (2 + keep_last if keep_last else written)
    assert by_time["checkpoint_interval_minutes"] == 30


def sizes(*overrides, world_size):
    held = memory_bytes_per_rank(plan_of(*overrides, world_size=world_size))
    return {name: held[name] for name in ("weights", "gradients", "moments")}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_per_rank_of_fsdp2(world_size):
    """fp32 weights, gradients and moments, each sharded, and two of the two layers gathered in 16 bits."""
    P = PARAMETERS
    reduced_each = sizes("engine.reduce_gradients=micro-batch", world_size=world_size)
    assert reduced_each == {
        "weights": 4 * P / world_size + 2 * P,
        "gradients": 4 * P / world_size,
        "moments": 8 * P / world_size,
    }
    whole = 4 * P if world_size > 1 else 0  # what several micro-batches sum before they are reduced
    assert sizes(world_size=world_size) == reduced_each | {"gradients": 4 * P / world_size + whole}
    one_micro_batch = f"training.global_batch_sequences={world_size}", "training.micro_batch_sequences=1"
    assert sizes(*one_micro_batch, world_size=world_size) == reduced_each


def test_bytes_per_rank_in_codes():
    """A fourth of a byte for a coded weight, and this rank's own; in 16 bits what has no codes, or two blocks of it."""
    outside, coded, norms = 64 * 16 + 16, 4 * 16 * 16 + 3 * 16 * 24, 2 * 16
    overrides = "model.num_layers=16", "engine.gather=codes"
    shards = 4 * (outside + 16 * (coded + norms)) / 4
    held = sizes(*overrides, world_size=4)["weights"]
    assert held == shards + 2 * (outside + 16 * norms) + 16 * coded / 4 * (1 + 1 / 4)
    held = sizes(*overrides, r"phases.1.quantization.include=layers\.0\..*_proj", world_size=4)["weights"]
    assert held == shards + 2 * (outside + norms + 2 * (coded + norms)) + coded / 4 * (1 + 1 / 4)


def test_bytes_per_rank_of_fsdp2_in_fp32():
    """One rank gathers nothing but codes, twice; several gather in fp32."""
    fp32 = "training.compute_dtype=fp32"
    assert sizes(fp32, world_size=1)["weights"] == 4 * PARAMETERS + 2 * LINEAR_PARAMETERS / 4
    assert sizes(fp32, "engine.gather=weights", world_size=1)["weights"] == 4 * PARAMETERS
    assert sizes(fp32, world_size=2)["weights"] == 2 * PARAMETERS + 4 * PARAMETERS


def test_replicas_shard_over_fewer_ranks():
    assert sizes("engine.replicas=2", world_size=4) == sizes(world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_per_rank_of_zero(world_size):
    P, N = PARAMETERS, world_size

    def stage(number):
        return sizes("engine.name=deepspeed", f"engine.zero_stage={number}", world_size=N)

    codes = LINEAR_PARAMETERS / 4
    assert stage(0) == {"weights": 2 * P + 4 * P + codes, "gradients": 2 * P, "moments": 8 * P}
    assert stage(1) == {"weights": 2 * P + 4 * P / N + codes, "gradients": 4 * P, "moments": 8 * P / N}
    assert stage(2) == {"weights": 2 * P + 4 * P / N + codes, "gradients": 4 * P / N, "moments": 8 * P / N}
    assert stage(3) == {"weights": 2 * P / N + 4 * P / N + 2 * P + codes, "gradients": 4 * P / N, "moments": 8 * P / N}
    in_int2 = "engine.name=deepspeed", "engine.zero_stage=0", "phases.1.quantization.levels=int2"
    assert sizes(*in_int2, world_size=N)["weights"] == 2 * P + 4 * P + LINEAR_PARAMETERS


def test_the_embedding_stays_gathered_beside_two_blocks():
    block = LINEAR_PARAMETERS // 2 + 2 * 16
    assert sizes("model.num_layers=5", world_size=4)["weights"] == 4 * (PARAMETERS + 3 * block) / 4 + 2 * PARAMETERS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_an_offloaded_optimizer_of_zero_leaves_on_the_device(stage):
    """DeepSpeed makes masters, moments and, at stage 3, the gradients' buffer on its own device, which is the host."""
    zero = ["engine.name=deepspeed", f"engine.zero_stage={stage}", "training.compute_dtype=bf16"]
    kept, moved = sizes(*zero, world_size=2), sizes(*zero, "engine.offload=optimizer", world_size=2)
    assert moved["weights"] == kept["weights"] - 4 * PARAMETERS / 2
    assert moved["gradients"] == (2 * PARAMETERS if stage == 3 else kept["gradients"])  # two blocks are all there are
    assert moved["moments"] == 0


@pytest.mark.parametrize(
    ("overrides", "a_parameter"),
    [
        (["engine.offload=none"], 0),
        (["engine.offload=all"], 16 / 4),
        (["engine.offload=all", "engine.replicas=2"], 16 / 2),
        (["engine.name=deepspeed", "engine.zero_stage=2", "engine.offload=optimizer"], 16 / 4),
        (["engine.name=deepspeed", "engine.zero_stage=3", "engine.offload=optimizer"], 20 / 4),
        (["engine.name=deepspeed", "engine.zero_stage=3", "engine.offload=all"], 22 / 4),
    ],
)
def test_what_is_offloaded_is_sharded_as_the_optimizer_is(overrides, a_parameter):
    plan = plan_of("training.compute_dtype=bf16", *overrides, world_size=4)
    assert offloaded_bytes_per_rank(plan) == a_parameter * PARAMETERS


def test_offloaded_moments_leave_the_device():
    assert sizes("engine.offload=all", world_size=2)["moments"] == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_several_micro_batches_sum_stay_on_the_device_if_all_is_offloaded(world_size):
    """FSDP2 moves gradients to the host once they are reduced."""
    summed, reduced_each = (
        sizes("engine.offload=all", f"engine.reduce_gradients={when}", world_size=world_size)["gradients"]
        for when in ("step", "micro-batch")
    )
    assert summed == reduced_each + 4 * PARAMETERS


def test_activations_are_the_models_and_those_of_the_largest_phase():
    def held(*overrides):
        return memory_bytes_per_rank(plan_of(*overrides))["activations"]

    config = plan_of().config.model
    modes = ("no", "ramp", "codes")
    no, ramp, codes = (activation_bytes(config, 2, 8, 2, checkpointing=False, quantized=mode) for mode in modes)
    assert codes < no < ramp
    assert held() == no
    assert held("phases=[{precision: ternary, steps: 9}]") == codes
    assert held("phases=[{precision: ternary, steps: 9, transition: {activation_ramp: {steps: 2}}}]") == ramp
    assert held("phases.1.transition.ramp.steps=3") == ramp
    assert held("training.activation_checkpointing=true") == activation_bytes(config, 2, 8, 2, True, "no")
    assert held("phases=[{precision: 16-bit, steps: 9}]") == activation_bytes(config, 2, 8, 2, False, "no")
    assert held("training.compute_dtype=fp32") == activation_bytes(config, 2, 8, 4, False, "no")


# What is shipped


@pytest.mark.parametrize(
    ("name", "parameters", "ternary", "tokens_per_step", "steps", "ranks"),
    [
        ("olmo-1b", 1_176_764_416, 1_073_741_824, 4_194_304, [2000, 8000], [8, 16, 64, 256]),
        ("tiny-150m", 151_944_960, 113_246_208, 524_288, [1145, 4578], [1, 2, 4, 8, 32]),
        ("llama-1b", 1_235_814_400, 973_078_528, 2_097_152, [7153, 4768], [8, 16, 64, 256]),
        ("bitnet-2b", 2_412_820_480, 2_084_044_800, 2_097_152, [4578, 18311], [8, 16, 64, 256]),
    ],
)
def test_shipped_plans(name, parameters, ternary, tokens_per_step, steps, ranks):
    config = load_config(CONFIGS / f"{name}.yaml")
    for world_size in ranks:
        numbers = describe(make_plan(config, world_size))
        assert numbers["parameters"] == parameters
        assert numbers["ternary_parameters"] == ternary
        assert numbers["tokens_per_step"] == tokens_per_step
        assert [phase["steps"] for phase in numbers["phases"]] == steps
        assert numbers["total_bytes_per_rank"] < 80e9
    if config.training.total_tokens:
        assert sum(steps) == math.ceil(config.training.total_tokens / tokens_per_step)


def test_quickstart_plans_on_a_laptop():
    config = load_config(CONFIGS / "quickstart.yaml")
    for world_size in (1, 2):
        assert describe(make_plan(config, world_size))["total_bytes_per_rank"] < 2**30
