"""The global batch and the sequence length as functions of the step, against a run that is counted step by step."""

import copy
import math
from itertools import accumulate, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import TREE, phases, plan_of, refusal, steps_of

from launcher.config.file import parse_config
from launcher.errors import ConfigError
from launcher.plan.batches import GlobalBatch
from launcher.plan.course import make_course
from launcher.plan.events import events
from launcher.plan.table import describe
from model.size import flops_per_token

LENGTH, MICRO = 8, 2
LENGTHS = (1, 2, 4)


@st.composite
def warmups(draw, most_stages=4):
    """Sizes and ends of stages, both ascending, and the full batch, in sequences."""
    sizes = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=most_stages + 1)))
    ends = sorted(draw(st.sets(st.integers(1, 600), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    *stages, full = [MICRO * size for size in sizes]
    return list(zip(stages, ends, strict=True)), full


def counted(stages, full, num_steps):
    """The sequences of each step: it is of the first stage whose tokens the steps before have not reached."""
    sizes, tokens = [], 0
    for _ in range(num_steps):
        sizes.append(next((size for size, until in stages if tokens < until), full))
        tokens += sizes[-1] * LENGTH
    return sizes


def resolved(stages, full):
    """The batch; discards warm-ups of which a stage has no step."""
    try:
        return GlobalBatch.of(full, stages, LENGTH)
    except ConfigError as error:
        reached = counted(stages, full, 100)
        assert any(size not in reached for size, _ in stages), error  # noqa: PT017
        assume(False)


@settings(max_examples=50)
@given(warmups(), st.floats(0, 1))
def test_every_step_has_the_batch_of_its_stage(warmup, share):
    stages, full = warmup
    batch = resolved(stages, full)
    sizes = counted(stages, full, 100)
    sums = [0, *accumulate(sizes)]
    assert {size for size, _ in stages} <= set(sizes)
    assert [batch.stage_at(step).sequences for step in range(100)] == sizes
    assert [batch.before(step) for step in range(101)] == sums
    assert all(size % batch.unit == 0 for size in sizes)
    for sequences in range(0, sums[60], 3):
        assert batch.steps_with(sequences) == next(n for n, total in enumerate(sums) if total >= sequences)
        assert batch.steps_within(sequences) == max(n for n, total in enumerate(sums) if total <= sequences)
    near, wanted = batch.steps_near(share, 100), share * sums[100]
    assert min(abs(total - wanted) for total in sums) == pytest.approx(abs(sums[near] - wanted), abs=1e-6)


def course_of(stages, full, lengths=(), **sections):
    tree = copy.deepcopy(TREE)
    tree["training"] = {
        "global_batch_sequences": full,
        "micro_batch_sequences": MICRO,
        "batch_warmup": [{"sequences": size, "until_tokens": until} for size, until in stages],
        "sequence_warmup": [{"length": length, "until_tokens": until} for length, until in lengths],
    }
    tree["schedule"] = {"shape": "constant"}
    for name, keys in sections.items():
        tree[name] = keys if isinstance(keys, list) else tree[name] | keys
    return make_course(parse_config(tree, stored=True))


LONG = 2_000
"""Tokens of a phase after any of these warm-ups."""


@settings(max_examples=50)
@given(warmups(), st.data())
def test_positions_are_contiguous_and_tokens_exact(warmup, data):
    stages, full = warmup
    resolved(stages, full)
    ends = sorted(data.draw(st.sets(st.integers(1, 600), min_size=len(LENGTHS), max_size=len(LENGTHS))))
    first_tokens = data.draw(st.integers(1, 900))
    restarts = data.draw(st.sampled_from(["continue", "restart"]))
    lengths = list(zip(LENGTHS, ends, strict=True))
    two = [
        {"precision": "16-bit", "tokens": first_tokens},
        {"precision": "ternary", "tokens": LONG, "transition": {"data": restarts}},
    ]
    try:
        course = course_of(stages, full, lengths, phases=two)
    except ConfigError as error:
        assert "a stage needs a step" in str(error)  # noqa: PT017
        assume(False)
    switch, total = course.phases[1].start, course.total_steps
    sums = [0, *accumulate(counted(stages, full, total))]
    assert [course.tokens_before(step) for step in range(total + 1)] == [LENGTH * each for each in sums]
    assert LENGTH * sums[switch - 1] < first_tokens <= LENGTH * sums[switch]
    assert LENGTH * (sums[-2] - sums[switch]) < LONG <= LENGTH * (sums[-1] - sums[switch])
    for step, following in pairwise(range(total)):
        after = course.first_sequence_at(step) + course.sequences_at(step)
        expected = 0 if restarts == "restart" and following == switch else after
        assert course.first_sequence_at(following) == expected
        assert course.first_sequence_at(step) % course.batch.unit == 0
    by_hand = [
        next((length for length, until in lengths if LENGTH * sums[step] < until), LENGTH) for step in range(total)
    ]
    assert [course.length_at(step) for step in range(total)] == by_hand
    assert course.total_flops == sum(
        flops_per_token(course.config.model, by_hand[step]) * course.tokens_at(step) for step in range(total)
    )
    changes = [
        step
        for step in range(1, total)
        if (course.sequences_at(step), by_hand[step]) != (course.sequences_at(step - 1), by_hand[step - 1])
    ]
    assert [step for step in range(total) if course.changes_size_at(step)] == changes


@settings(max_examples=50)
@given(warmups(), st.integers(1, 5000), st.integers(0, 100))
def test_lengths_in_tokens_are_the_fewest_steps_that_have_them(warmup, tokens, start):
    stages, full = warmup
    resolved(stages, full)
    course = course_of(stages, full, phases=[{"precision": "16-bit", "tokens": LONG}])
    steps = course.steps_of(tokens, start)
    begun = course.tokens_before(start)
    assert course.tokens_before(start + steps - 1) - begun < tokens <= course.tokens_before(start + steps) - begun


@settings(max_examples=50)
@given(warmups(), st.lists(st.integers(1, 9), min_size=2, max_size=3), st.booleans())
def test_fractions_are_shares_of_the_tokens(warmup, weights, has_rest):
    stages, full = warmup
    resolved(stages, full)
    shares = [weight / sum(weights) for weight in weights]
    total_tokens = 5_000
    fractions = [*shares[:-1], "rest" if has_rest else shares[-1]]
    course = course_of(
        stages,
        full,
        training={
            "global_batch_sequences": full,
            "micro_batch_sequences": MICRO,
            "batch_warmup": [{"sequences": size, "until_tokens": until} for size, until in stages],
            "total_tokens": total_tokens,
        },
        phases=[{"precision": "16-bit", "fraction": fraction} for fraction in fractions],
    )
    assert course.tokens_before(course.total_steps - 1) < total_tokens <= course.total_tokens
    for phase, share in zip(course.phases, accumulate(shares), strict=True):
        assert abs(course.tokens_before(phase.end) - share * course.total_tokens) <= LENGTH * full


WARMUP = "training.batch_warmup=[{sequences: 4, until_tokens: 64}, {sequences: 8, until_tokens: 192}]"


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [
        # Steps have 32, 32, 64, 64, and then 192 tokens.
        (("tokens: 64", "tokens: 129"), None, [2, 3]),
        (("tokens: 65", "tokens: 65"), None, [3, 2]),
        (("steps: 3", "tokens: 65"), None, [3, 2]),
        (("fraction: 0.5", "fraction: 0.5"), "total_steps=10", [5, 5]),
        (("fraction: 0.5", "fraction: 0.5"), "total_tokens=384", [4, 1]),
        (("fraction: 0.1", "fraction: 0.9"), "total_tokens=384", [1, 4]),
        (("fraction: rest", "tokens: 192"), "total_tokens=384", [4, 1]),
        (("fraction: rest", "tokens: 193"), "total_tokens=384", [3, 2]),
        (("tokens: 33", "fraction: rest", "steps: 1"), "total_tokens=384", [2, 2, 1]),
        (("steps: 4", "fraction: 0.5"), "total_tokens=384", [4, 1]),
    ],
)
def test_phases_resolve(lengths, total, expected):
    overrides = ["schedule.warmup_steps=0", *phases(*lengths), *([f"training.{total}"] if total else [])]
    assert steps_of(plan_of(WARMUP, *overrides)) == expected


@settings(max_examples=50)
@given(
    st.integers(1, 30),
    st.lists(st.sampled_from(["steps: {}", "tokens: {}", "fraction: 0.{}", "fraction: rest"]), min_size=2, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.sampled_from(["total_steps", "total_tokens"]),
    st.integers(40, 20_000),
)
def test_without_a_warm_up_lengths_are_as_they_always_were(full, kinds, numbers, key, total):
    """The arithmetic of a constant batch, as it was before batches could change."""
    lengths = [kind.format(number) for kind, number in zip(kinds, numbers, strict=False)]
    assume(lengths.count("fraction: rest") <= 1)
    tokens_per_step = full * MICRO * LENGTH
    total_steps = total if key == "total_steps" else math.ceil(total / tokens_per_step)
    expected, share = [], 0.0
    for length in lengths:
        name, value = length.split(": ")
        if value == "rest":
            expected.append(None)
        elif name == "fraction":
            fraction = float(value)
            expected.append(round((share + fraction) * total_steps) - round(share * total_steps))
            share += fraction
        else:
            expected.append(int(value) if name == "steps" else math.ceil(int(value) / tokens_per_step))
    if None in expected:
        expected[expected.index(None)] = total_steps - sum(filter(None, expected))
    whole = any(length.startswith("fraction") for length in lengths)
    try:
        plan = plan_of(
            "schedule.warmup_steps=0",
            f"training.global_batch_sequences={full * MICRO}",
            *phases(*lengths),
            *([f"training.{key}={total}"] if whole else []),
        )
    except ConfigError:
        are_shares = all(length.startswith("fraction: 0") for length in lengths)  # which must make the whole
        unequal = sum(expected) != total_steps or (are_shares and abs(share - 1) > 1e-9)
        assert min(expected) < 1 or unequal or share > 1 - 1e-9
    else:
        assert steps_of(plan) == expected
        assert plan.tokens_before(plan.total_steps) == plan.total_steps * tokens_per_step


def test_each_stage_must_divide_on_the_ranks():
    assert plan_of(WARMUP, world_size=2).micro_batches_at(0) == 1
    assert [plan_of(WARMUP).micro_batches_at(step) for step in range(6)] == [2, 2, 4, 4, 12, 12]
    assert refusal(WARMUP, world_size=4) == (
        "training.batch_warmup.0.sequences: 4 sequences do not divide into micro-batches of 2 on 4 ranks; "
        "training.micro_batch_sequences of 1 would"
    )
    assert refusal(WARMUP, world_size=3) == (
        "training.batch_warmup.0.sequences: 4 sequences do not divide into micro-batches of 2 on 3 ranks; "
        "a multiple of 6 sequences would, such as 6"
    )
    assert plan_of(WARMUP, "training.micro_batch_sequences=1", world_size=4).micro_batches_at(0) == 1


def test_what_the_plan_says():
    lengths = "training.sequence_warmup=[{length: 2, until_tokens: 96}]"
    plan = plan_of(WARMUP, lengths, *phases("steps: 5", "steps: 5"))
    assert [(event["step"], event["what"]) for event in events(plan)] == [
        (0, "the global batch is 4 sequences, 32 tokens"),
        (0, "sequences have 2 tokens"),
        (2, "the global batch is 8 sequences, 64 tokens"),
        (3, "sequences have 8 tokens"),
        (4, "the global batch is 24 sequences, 192 tokens"),
        (5, "quantization at full strength at once"),
    ]
    numbers = describe(plan)
    assert [phase["tokens"] for phase in numbers["phases"]] == [384, 960]
    assert (numbers["total_tokens"], numbers["tokens_per_step"], numbers["micro_batches_per_step"]) == (1344, 192, 12)
    short, long = (flops_per_token(plan.config.model, length) for length in (2, 8))
    assert short < long == numbers["flops_per_token"]
    assert numbers["total_flops"] == 128 * short + (1344 - 128) * long
    assert numbers["bytes_per_rank"] == describe(plan_of(*phases("steps: 5", "steps: 5")))["bytes_per_rank"]


def test_what_is_given_in_tokens_at_a_switch_counts_from_there():
    drop = "phases.1.transition={rewarm_tokens: 128, learning_rate_drop: {factor: 0.5, tokens: 64}}"
    plan = plan_of(WARMUP, "schedule={shape: constant}", *phases("steps: 2", "steps: 8"), drop)
    rates = [plan.learning_rate_at(step) / 0.01 for step in range(6)]
    assert rates == [1, 1, 0.25, 1, 1, 1]  # 128 tokens are 2 steps of 64, 64 tokens one
    back = "phases.1.transition={ramp: {steps: 1}, rollback: {after_tokens: 128, max_attempts: 1}}"
    plan = plan_of(WARMUP, *phases("steps: 2", "steps: 8"), back)
    assert plan.rollback_step(plan.phases[1]) == 2 + 1 + 2  # after the ramp: 64 and 192 tokens


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.batch_warmup=[{sequences: 3, until_tokens: 64}]",
         "training.batch_warmup.0.sequences: is 3; must be a multiple of micro_batch_sequences 2, such as 2"),
        ("training.batch_warmup=[{sequences: 24, until_tokens: 64}]",
         "training.batch_warmup.0.sequences: is 24; must be below the global batch of 24 sequences, which follows"),
        ("training.batch_warmup=[{sequences: 0, until_tokens: 64}]",
         "training.batch_warmup.0.sequences: is 0; must be 1 or more"),
        ("training.batch_warmup=[{sequences: 4, until_tokens: 99}, {sequences: 4, until_tokens: 100}]",
         "training.batch_warmup.1.sequences: is 4; must be above the 4 of the stage before"),
        ("training.batch_warmup=[{sequences: 4, until_tokens: 99}, {sequences: 8, until_tokens: 99}]",
         "training.batch_warmup.1.until_tokens: is 99; must be above the 99 of the stage before"),
        ("training.batch_warmup=[{sequences: 4, until_tokens: 65}, {sequences: 8, until_tokens: 96}]",
         "training.batch_warmup.1.until_tokens: is 96, which the last step of the stage before reaches with 96; "
         "set it above that"),
        ("training.sequence_warmup=[{length: 3, until_tokens: 64}]",
         "training.sequence_warmup.0.length: is 3; must divide data.sequence_length 8 and be below it, such as 4, 2, "
         "1"),
        ("training.sequence_warmup=[{length: 2, until_tokens: 1}, {length: 4, until_tokens: 2}]",
         "training.sequence_warmup.1.until_tokens: is 2, which step 1 reaches, where the stage before ends; a stage "
         "needs a step"),
        ("training.batch_warmup=[{sequences: 4, until_tokens: 320}]",
         "training.batch_warmup.0.until_tokens: is 320, and the run has 320 tokens; a warm-up must leave at least a "
         "step"),
        ("training.sequence_warmup=[{length: 4, until_tokens: 1920}]",
         "training.sequence_warmup.0.until_tokens: is 1920, and the run has 1920 tokens; a warm-up must leave at least "
         "a step"),
    ],
)  # fmt: skip
def test_warm_ups_that_cannot_be_are_refused(override, told):
    assert refusal(override) == told


def test_a_batch_in_tokens_has_a_warm_up_too():
    in_tokens = ["training.global_batch_sequences=null", "training.global_batch_tokens=192"]
    assert plan_of(*in_tokens, WARMUP).batch == plan_of(WARMUP).batch
    assert "must be below the global batch of 24 sequences" in refusal(
        *in_tokens, "training.batch_warmup=[{sequences: 24, until_tokens: 9}]"
    )


def test_the_factor_of_ternary_layers_is_a_curve_over_each_ternary_phase():
    def factors(curve, *lengths):
        plan = plan_of(f"optimizer.ternary_learning_rate_factor={curve}", *phases(*lengths))
        return [plan.ternary_factor_at(step) for step in range(plan.total_steps)]

    two = ("steps: 4", "steps: 4", "steps: 2")
    assert factors("{start: 2.0, end: 1.0}", *two) == [1, 1, 1, 1, 2, 1.75, 1.5, 1.25, 1, 1]
    assert factors("{start: 2.0, end: 1.0, steps: 2}", *two) == [1, 1, 1, 1, 2, 1.5, 1, 1, 1, 1]
    assert factors("{start: 1.0, end: 3.0, fraction: 0.5}", *two) == [1, 1, 1, 1, 1, 2, 3, 3, 1, 1]
    assert factors("{start: 2, end: 2}", *two) == factors("2", *two)
    assert "is 5, longer than the 4 steps of phase 1" in refusal(
        "optimizer.ternary_learning_rate_factor={start: 2, end: 1, steps: 5}", *phases(*two)
    )
    plan = plan_of("optimizer.ternary_learning_rate_factor={start: 2, end: 1, steps: 2}", *phases(*two))
    whats = [event["what"] for event in events(plan)]
    assert "quantized layers have 2 times the learning rate, linearly to 1 at step 6" in whats


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("x", ": is 'x'; must be a valid number or a mapping of keys"),
        ("[1]", ": is [1]; must be a valid number or a mapping of keys"),
        ("-1", ": is -1.0; must be above 0"),
        ("{start: 2}", ".end: is missing"),
        ("{start: 2, end: x}", ".end: is 'x'; must be a valid number"),
        ("{start: 2, end: 0}", ".end: is 0.0; must be above 0"),
        ("{start: 2, end: 1, stps: 4}", ".stps: unknown key; did you mean steps?"),
        ("{start: 2, end: 1, steps: 4, fraction: 0.5}", ".steps: give at most one of steps and fraction"),
        ("{start: 2, end: 1, steps: 0}", ".steps: is 0; must be 1 or more"),
        ("{start: 2, end: 1, fraction: 2}", ".fraction: is 2.0; must be above 0 and at most 1"),
    ],
)
def test_factors_that_cannot_be_are_refused(value, told):
    assert refusal(f"optimizer.ternary_learning_rate_factor={value}") == f"optimizer.ternary_learning_rate_factor{told}"
