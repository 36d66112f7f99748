"""Trunks: arms share exactly the steps that are the same in all that influences the weights."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tree

from launcher.config.file import apply_override, parse_config
from launcher.errors import ConfigError
from launcher.formats.start import first_progress
from launcher.plan.plan import make_plan
from launcher.study.arms import Arm
from launcher.study.jobs import Job, claimed, jobs_of
from launcher.study.results import twin_of
from launcher.study.sharing import share
from launcher.study.table import num_steps, stretches

WSD = "schedule={shape: wsd, warmup_steps: 2, decay_fraction: 0.25}"
COSINE = "schedule={shape: cosine, warmup_steps: 2}"
LATE = "schedule={shape: linear, warmup_steps: 2, decay_from_phase: 1}"
STEPS = 40


def arm(name: str, *overrides: str, switch: int | None = 20, steps: int = STEPS) -> Arm:
    tree = tiny_tree(Path("shards"), Path("run") / name)
    tree["phases"] = [{"precision": "16-bit", "steps": steps}]
    if switch is not None:
        tree["phases"] = [{"precision": "16-bit", "steps": switch}, {"precision": "ternary", "steps": steps - switch}]
    for override in overrides or (WSD,):
        apply_override(tree, override)
    return Arm(name=name, point={}, plan=make_plan(parse_config(tree), 1))


def shared(first: Arm, second: Arm) -> int:
    """Steps that are trained once for two arms."""
    return sum(trunk.end - trunk.begin for trunk in share([first, second]).trunks)


def test_arms_of_one_schedule_share_up_to_the_first_switch() -> None:
    assert shared(arm("a", switch=20), arm("b", switch=30)) == 20
    assert shared(arm("a", WSD, switch=20), arm("b", WSD, "phases.1.transition.optimizer=reset", switch=20)) == 20
    assert shared(arm("a", COSINE, switch=20), arm("b", COSINE, switch=30)) == 20
    assert shared(arm("a", LATE, switch=20), arm("b", LATE, switch=30)) == 20


def test_the_16_bit_run_shares_up_to_the_switch() -> None:
    assert shared(arm("a", switch=20), arm("b", switch=None)) == 20


def test_schedules_share_as_far_as_their_rates_are_equal() -> None:
    # Both warm up for two steps, and cosine's first step after that is at the peak as well.
    assert shared(arm("a", WSD), arm("b", COSINE)) == 3
    # Decays of 10 and of 15 steps: from step 25 on the rates differ.
    later = WSD.replace("0.25", "0.375")
    assert shared(arm("a", WSD, switch=None), arm("b", later, switch=None)) == 26


def test_a_decay_inside_the_16_bit_phase_is_shared_only_by_those_that_have_it() -> None:
    # In `wsd`, the first decaying step still has the peak's rate.
    found = share([arm("a", switch=36), arm("b", LATE, switch=36)])
    assert [(trunk.begin, trunk.end) for trunk in found.trunks] == [(0, 31)]
    assert found.partings == (
        "a and b part at step 31, where neither switches: their learning rates are 0.00273 and 0.003.",
    )


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "data.shuffle_seed=1",
        "optimizer.learning_rate=1e-3",
        "optimizer.weight_decay=0.2",
        "optimizer.name=muon",
        "optimizer.betas=[0.9, 0.99]",
        "optimizer.weight_decay_until=0.01",
        "model.sub_norm=true",
        "training.micro_batch_sequences=4",
        "training.compute_dtype=bf16",
        "data.sequence_length=16",
        "engine={name: deepspeed, zero_stage: 1}",
        "training.skip_outliers={}",
        "training.batch_warmup=[{sequences: 4, until_tokens: 1024}]",
        "training.sequence_warmup=[{length: 16, until_tokens: 1024}]",
        "averaging.half_life_tokens=1024",
        "phases.1.transition.rollback={after_tokens: 256}",
        "phases.1.transition.optimizer_name=muon",
        "phases.1.quantization={weights: learned, granularity: row}",
    ],
)
def test_what_influences_the_weights_is_not_shared(override: str) -> None:
    assert shared(arm("a", WSD), arm("b", WSD, override)) == 0


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "logging.interval_steps=5",
        "evaluation.interval_steps=5",
        "checkpoint.keep_last=3",
        "data.validation_rows=4",
        "phases.1.quantization.preset=nielsen-2025",
        "phases.1.transition.ramp={shape: linear, steps: 5}",
        "phases.1.transition.rewarm_tokens=512",
        "phases.1.transition.data=restart",
        "phases.1.sources=[{path: other}]",
        "phases.1.sequence_length=16",
        "phases.1.learning_rate=1e-5",
        "optimizer.weight_decay_until=ternary",
    ],
)
def test_what_does_not_influence_the_first_steps_is_shared(override: str) -> None:
    # The first two steps after a switch may be the same, but belong to different phases.
    second = "phases.1.transition.optimizer=reset"
    assert shared(arm("a", WSD), arm("b", WSD, second, override)) == 20


def test_arms_share_as_far_as_their_data_are_the_same() -> None:
    same, other = "phases.1.sources=[{path: shards}]", "phases.1.sources=[{path: other}]"
    assert shared(arm("a", WSD), arm("b", WSD, same)) == STEPS - 1
    assert shared(arm("a", WSD, other), arm("b", WSD, other)) == STEPS - 1
    assert shared(arm("a", WSD, same), arm("b", WSD, other)) == 20
    assert shared(arm("a", WSD), arm("b", WSD, "phases.0.sources=[{path: other}]")) == 0
    three = "phases=[{precision: 16-bit, steps: 10}, {precision: 16-bit, steps: 10, sources: [{path: other}]}, "
    three += "{precision: ternary, steps: 20}]"
    back = "phases.2.sources=[{path: shards}]"
    assert shared(arm("a", WSD, three), arm("b", WSD, three, back)) == 20


def test_schedules_of_phases_share_as_far_as_their_rates_are_equal() -> None:
    own = [WSD, "phases.1.schedule={shape: constant, warmup_steps: 3}"]
    # The schedule of the run ends where that of the phase begins: other rates from the decay of 5 steps on.
    assert shared(arm("a", WSD), arm("b", *own)) == 16
    assert shared(arm("a", *own), arm("b", *own, "phases.1.learning_rate=1e-5")) == 20
    # Warm-ups of three steps and the first step after them are the same.
    cosine = "phases.1.schedule={shape: cosine, warmup_steps: 3}"
    assert shared(arm("a", *own), arm("b", WSD, cosine)) == 24
    assert shared(arm("a", *own, switch=20), arm("b", *own, switch=24)) == 16


def test_arms_that_begin_with_other_models_share_nothing() -> None:
    begin = ["checkpoint.start_from=model", "model.sub_norm=true"]
    arms = [arm(f"of-{number}", WSD, *begin, f"checkpoint.sub_norm_sequences={number}") for number in (4, 8)]
    assert shared(*arms) == 0


def test_a_short_stretch_is_not_worth_a_trunk() -> None:
    # Of 400 steps the warm-up of two and the first step after it are the same.
    assert shared(arm("a", WSD, steps=400), arm("b", COSINE, steps=400)) == 0


def test_equal_arms_share_all_but_the_last_step() -> None:
    assert shared(arm("a"), arm("b")) == STEPS - 1


def test_a_twin_is_the_16_bit_run_of_the_same_trunk() -> None:
    twin, other = arm("twin", switch=None), arm("other", "run.seed=1", WSD, switch=None)
    arms = [other, arm("scratch", WSD, "phases=[{precision: ternary, steps: 40}]"), twin, arm("a"), arm("b", COSINE)]
    sharing = share(arms)
    assert twin_of(arms[3], arms, sharing) is twin
    assert [twin_of(each, arms, sharing) for each in (arms[0], arms[1], twin, arms[4])] == [None] * 4


CHOICES = st.fixed_dictionaries(
    {
        "switch": st.sampled_from([None, 10, 20, 30, 35]),
        "schedule": st.sampled_from([WSD, COSINE, WSD.replace("0.25", "0.5")]),
        "seed": st.sampled_from([0, 1]),
        "rate": st.sampled_from([3e-3, 1e-3]),
        "state": st.sampled_from(["keep", "reset"]),
        "data": st.sampled_from(["shards", "other"]),
    }
)


def arm_of(index: int, choice: dict[str, object]) -> Arm:
    overrides = [str(choice["schedule"]), f"run.seed={choice['seed']}", f"optimizer.learning_rate={choice['rate']}"]
    if choice["switch"] is not None:
        overrides.append(f"phases.1.transition.optimizer={choice['state']}")
        overrides.append(f"phases.1.sources=[{{path: {choice['data']}}}]")
    return arm(f"arm-{index}", *overrides, switch=choice["switch"])  # type: ignore[arg-type]


def computed(each: Arm, step: int) -> tuple[object, ...]:
    """What an arm does in a step, from its plan alone."""
    phase, sizes = each.plan.phase_of(step), each.plan.sizes_at(step)
    about = (phase.start, phase.precision, phase.quantization, phase.transition.optimizer if phase.start else None)
    data = (each.plan.data_at(step), each.plan.length_at(step), each.plan.first_sequence_at(step))
    return (each.config.run.seed, sizes, about, each.plan.strengths_at(step), data)


@settings(max_examples=30)
@given(st.lists(CHOICES, min_size=1, max_size=7))
def test_arms_are_their_trunks_and_then_themselves(choices: list[dict[str, object]]) -> None:
    arms = [arm_of(index, choice) for index, choice in enumerate(choices)]
    sharing = share(arms)
    trunks = {trunk.name: trunk for trunk in sharing.trunks}
    assert len(trunks) == len(sharing.trunks)
    for each in arms:
        covered, at = [], sharing.begin_of(each)
        name = sharing.parents[each.name]
        while name is not None:
            trunk = trunks[name]
            assert trunk.end == at
            covered += range(trunk.begin, trunk.end)
            for step in range(trunk.begin, trunk.end):  # the trunk does in each step what the arm would
                assert computed(trunk.arm, step) == computed(each, step)
            at, name = trunk.begin, trunk.parent
        assert at == 0
        assert sorted(covered) == list(range(sharing.begin_of(each)))
    alone, together = map(num_steps, stretches(arms, sharing))
    assert alone == STEPS * len(arms)
    # No step that two arms have in common, with all before it, is trained twice: as many as there are prefixes.
    prefixes = set()
    for each in arms:
        prefix: tuple[object, ...] = ()
        for step in range(STEPS):
            prefix = (hash((prefix, repr(computed(each, step)))),)
            prefixes.add((prefix, each.name if step == STEPS - 1 else ""))
    assert together == len(prefixes)


def test_jobs_come_after_the_trunks_that_they_need(tmp_path: Path) -> None:
    arms = [arm("a", switch=10), arm("b", switch=20), arm("c", switch=30), arm("d", switch=None)]
    jobs = jobs_of(arms, share(arms), tmp_path)
    assert [job.is_trunk for job in jobs] == [True] * 3 + [False] * 4
    assert [(job.begin, job.end) for job in jobs] == [
        (0, 10),
        (10, 20),
        (20, 30),
        (10, 40),
        (20, 40),
        (30, 40),
        (30, 40),
    ]
    for index, job in enumerate(jobs):
        assert job.needs is None or job.needs in [earlier.name for earlier in jobs[:index]]


def test_a_run_that_starts_from_a_checkpoint_begins_where_training_would() -> None:
    tree = tiny_tree(Path("shards"), Path("run"))
    tree["checkpoint"] = {"start_from": "source", "start_phase": 1}
    plan = make_plan(parse_config(tree), 1)
    assert plan.first_step == first_progress(plan).step == 4
    assert arm("a").plan.first_step == first_progress(arm("a").plan).step == 0


def test_a_trunk_goes_on_with_the_configuration_that_it_began_with(tmp_path: Path) -> None:
    """Also where the study has got an arm that is first of those that share it."""
    arms = [arm("a", switch=20), arm("b", switch=30)]

    def trunk_of(arms: list[Arm]) -> Job:
        return jobs_of(arms, share(arms), tmp_path)[0]  # parents first

    begun = trunk_of(arms)
    begun.folder.prepare([20, 20])
    begun.folder.note_start(0, 1)
    begun.folder.write_state("interrupted", reason="signal", checkpoint=None, job=None)
    later = trunk_of([arm("16-bit", switch=None), *arms])
    assert (later.name, later.begin, later.end) == (begun.name, 0, 20)
    later.folder.check_configuration()
    assert later.config == begun.config
    assert later.plan == begun.plan


def test_a_folder_without_locks_is_named_and_not_taken_for_a_busy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of([arm("a")], share([arm("a")]), tmp_path)[0]

    def refuse_with(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("launcher.study.jobs.fcntl.lockf", refuse)

    for number in (errno.EAGAIN, errno.EACCES):
        refuse_with(number)
        with claimed(job, tmp_path) as is_mine:
            assert not is_mine
    refuse_with(errno.ENOLCK)
    with pytest.raises(ConfigError, match=r"--out .*claims: .*ENOLCK.*locks"), claimed(job, tmp_path):
        pass
