"""The grid of a study: its arms, their names, and what is wrong with them."""

import re
from pathlib import Path

import pytest
from made_studies import make_study
from studies import write_study

from launcher.errors import ConfigError
from launcher.process.console import Console
from launcher.run.changes import changes
from launcher.run.folder import RunFolder, read_tree
from launcher.study.arms import Arm, make_arms
from launcher.study.config import load_study
from launcher.study.sharing import share
from launcher.study.study import SHIPPED, Options, study

OPTIONS = Options(jobs=2, num_ranks=1, dry_run=True, gpu="H100", utilization=0.4)


def arms_of(folder, sections=None, **keys) -> list[Arm]:
    path = write_study(folder, Path("shards"), sections, **keys)
    return make_arms(*load_study(path, SHIPPED), folder / "out", 1)


def problem_of(folder, sections=None, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        arms_of(folder, sections, **keys)
    return str(caught.value)


STATE = {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]}
QUANTIZER = {"default": [], "nielsen": ["phases.1.quantization.preset=nielsen-2025"]}


def test_arms_are_named_by_what_differs(tmp_path):
    arms = arms_of(tmp_path, switch=[0.25, 0.5], axes={"state": STATE}, seeds=[0, 1], baselines=[])
    assert [arm.name for arm in arms] == [
        f"switch-{share}_state-{state}_seed-{seed}"
        for share in (25, 50)
        for state in ("keep", "reset")
        for seed in (0, 1)
    ]
    assert arms[0].config.run.path == tmp_path / "out" / "arms" / arms[0].name
    assert [arm.plan.phases[0].end for arm in arms] == [2] * 4 + [4] * 4
    assert [arm.plan.phases[1].transition.optimizer for arm in arms[:4:2]] == ["keep", "reset"]
    for arm in arms:
        seed = int(arm.point["seed"])
        assert (arm.config.run.seed, arm.config.data.shuffle_seed) == (seed, seed)
        assert arm.plan.total_steps == 8


def test_a_baseline_is_there_once_for_each_axis_that_matters_to_it(tmp_path):
    arms = arms_of(tmp_path, switch=[0.25, 0.5], axes={"state": STATE, "quantizer": QUANTIZER})
    by_name = {arm.name: arm for arm in arms}
    baselines = ["16-bit", "scratch_quantizer-default", "scratch_quantizer-nielsen"]
    assert list(by_name)[:3] == baselines
    assert len(arms) == 3 + 8
    assert [(phase.precision, phase.end) for phase in by_name["16-bit"].plan.phases] == [("16-bit", 8)]
    (scratch,) = by_name["scratch_quantizer-nielsen"].plan.phases
    assert (scratch.precision, scratch.end) == ("ternary", 8)
    assert scratch.quantization == by_name["switch-25_state-keep_quantizer-nielsen"].plan.phases[1].quantization


def test_a_baseline_keeps_a_decay_that_begins_with_a_phase(tmp_path):
    linear = "schedule={shape: linear, warmup_steps: 1, decay_from_phase: 1}"
    calibrated = "phases.1.transition.calibration={sequences: 8}"
    (twin, arm) = arms_of(tmp_path, overrides=[linear, calibrated], switch=[0.5], baselines=["16-bit"])
    assert [phase.precision for phase in twin.plan.phases] == ["16-bit", "16-bit"]
    steps = range(8)
    assert [twin.plan.sizes_at(step) for step in steps] == [arm.plan.sizes_at(step) for step in steps]


def test_a_baseline_reads_what_its_arm_reads(tmp_path):
    baselines = ["16-bit", "scratch", "post-training"]
    by_phase = ["phases.1.sources=[{path: other}]", "phases.1.sequence_length=16"]
    of_all = ["phases.0.sources=[{path: other}]", "phases.0.sequence_length=16"]
    for overrides, num_phases in ((by_phase, 2), (of_all, 1)):
        *found, arm = (each.plan for each in arms_of(tmp_path, overrides=overrides, switch=[0.5], baselines=baselines))
        assert [len(plan.phases) for plan in found] == [num_phases, num_phases, num_phases + 1]
        for plan in found:
            for step in range(arm.total_steps):
                assert (plan.data_at(step), plan.length_at(step)) == (arm.data_at(step), arm.length_at(step))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_baseline_learns_what_its_arm_learns(tmp_path, objective):
    baselines = ["16-bit", "scratch", "post-training"]
    of_all = [f"phases.{index}.objective={objective}" for index in (0, 1)] + ["checkpoint.start_from=model"]
    if objective == "dpo":
        of_all += [f"phases.{index}.preference={{beta: 2.0, length_normalized: true}}" for index in (0, 1)]
    by_phase = [each for each in of_all if ".0." not in each] + ["phases.1.sources=[{path: chats}]"]
    for overrides, num_phases in ((of_all, 1), (by_phase, 2)):
        *found, arm = (each.plan for each in arms_of(tmp_path, overrides=overrides, switch=[0.5], baselines=baselines))
        assert [len(plan.phases) for plan in found] == [num_phases, num_phases, num_phases + 1]
        for plan in found:
            for step in range(plan.total_steps):
                mine, of_arm = plan.phase_of(step), arm.phase_of(min(step, arm.total_steps - 1))
                assert (mine.objective, mine.preference) == (of_arm.objective, of_arm.preference)


def test_a_baseline_has_the_rates_of_its_arm(tmp_path):
    """Schedules and peaks of phases, also with the step that follows a rounding."""
    baselines = ["16-bit", "scratch", "post-training"]
    own = ["phases.1.schedule={shape: cosine, warmup_steps: 1}", "phases.1.learning_rate=1e-5"]
    for overrides in (own, own[:1], own[1:], ["schedule={shape: constant}"]):
        *found, arm = (each.plan for each in arms_of(tmp_path, overrides=overrides, switch=[0.5], baselines=baselines))
        expected = [arm.learning_rate_at(step) for step in range(arm.total_steps)]
        for plan in found:
            assert [plan.learning_rate_at(step) for step in range(arm.total_steps)] == expected


def test_weight_decay_ends_in_one_step_in_all_runs(tmp_path):
    baselines, sections = ["16-bit", "scratch", "post-training"], {"training": {"total_steps": 1000}}
    overrides = ["optimizer.weight_decay_until=0.8"]
    for arm in arms_of(tmp_path, sections, overrides=overrides, switch=[0.9], baselines=baselines):
        assert arm.plan.weight_decay_end == 800


def test_two_baselines_are_not_one_because_their_names_are(tmp_path):
    decays = {"+0": ["optimizer.weight_decay=0.1"], "-0": ["optimizer.weight_decay=0.2"]}
    with pytest.raises(ConfigError, match="two arms would have the name 16-bit_wd-0"):
        arms_of(tmp_path, axes={"wd": decays}, exclude=[{"wd": "-0", "baseline": "none"}])


@pytest.mark.parametrize("restarted", ["schedule", "data"])
def test_a_baseline_begins_anew_what_its_arm_does(tmp_path, restarted):
    overrides = [f"phases.1.transition.{restarted}=restart"]
    baselines = ["16-bit", "scratch", "post-training"]
    *found, arm = (each.plan for each in arms_of(tmp_path, overrides=overrides, switch=[0.5], baselines=baselines))
    expected = [(arm.first_sequence_at(step), arm.learning_rate_at(step)) for step in range(8)]
    assert len({first for first, _ in expected}) == (4 if restarted == "data" else 8)
    for plan in found:
        assert [(plan.first_sequence_at(step), plan.learning_rate_at(step)) for step in range(8)] == expected


def test_a_baseline_has_nothing_of_what_a_switch_needs(tmp_path):
    overrides = [
        "phases.1.transition.rewarm_tokens=600",
        "phases.1.transition.learning_rate_drop={factor: 0.1, tokens: 600}",
    ]
    twin, arm = (each.plan for each in arms_of(tmp_path, overrides=overrides, switch=[0.5], baselines=["16-bit"]))
    assert arm.learning_rate_at(4) < 0.1 * twin.learning_rate_at(4)
    assert len(twin.phases) == 1


def test_a_baseline_of_a_run_that_begins_with_a_later_phase_does_too(tmp_path):
    arms = arms_of(tmp_path, {"checkpoint": {"start_from": "model", "start_phase": 1}}, baselines=["16-bit", "scratch"])
    for arm in arms:
        assert (arm.plan.first_step, arm.plan.total_steps) == (4, 8)


def test_a_baseline_has_no_rates_of_its_own_for_what_it_lacks(tmp_path):
    base = {"optimizer": {"learning_rate": 1e-3, "ternary_learning_rate_factor": 2.0, "weight_decay_until": "ternary"}}
    twin, scratch, _ = arms_of(tmp_path, base | {"averaging": {"half_life_tokens": 1024}})
    assert [each.config.averaging.half_life_tokens for each in (twin, scratch)] == [1024, None]
    assert twin.config.optimizer.ternary_learning_rate_factor is None
    assert scratch.config.optimizer.ternary_learning_rate_factor == 2.0
    assert [each.plan.decay_factor_at(7) for each in (twin, scratch)] == [1.0, 1.0]


def test_rates_are_swept_where_asked(tmp_path):
    arms = arms_of(tmp_path, sweep={"rates": [1e-3, 3e-3], "only": [{"baseline": ["16-bit", "scratch"]}]})
    assert [arm.name for arm in arms] == [
        "16-bit_rate-0.001",
        "16-bit_rate-0.003",
        "scratch_rate-0.001",
        "scratch_rate-0.003",
        "arm",
    ]
    assert [arm.config.optimizer.learning_rate for arm in arms] == [1e-3, 3e-3, 1e-3, 3e-3, 3e-3]


def test_only_and_exclude_cut_the_grid(tmp_path):
    arms = arms_of(
        tmp_path,
        switch=[0.25, 0.5],
        axes={"state": STATE},
        seeds=[0, 1],
        baselines=["16-bit"],
        only=[{"switch": "50%"}, {"state": "keep"}],
        exclude=[{"seed": 1, "state": "reset"}, {"seed": 1, "baseline": "16-bit"}],
    )
    assert [arm.name for arm in arms] == [
        "16-bit_seed-0",
        "switch-25_state-keep_seed-0",
        "switch-25_state-keep_seed-1",
        "switch-50_state-keep_seed-0",
        "switch-50_state-keep_seed-1",
        "switch-50_state-reset_seed-0",
    ]


def test_a_word_that_yaml_reads_as_true_selects_the_value_of_that_name(tmp_path):
    norms = {"true": ["model.sub_norm=true"], "false": []}
    arms = arms_of(tmp_path, axes={"sub-norm": norms}, baselines=[], exclude=[{"sub-norm": True}])
    assert [arm.point["sub-norm"] for arm in arms] == ["false"]
    assert "sub-norm: names true; the values are a, b" in problem_of(
        tmp_path, axes={"sub-norm": {"a": [], "b": []}}, only=[{"sub-norm": True}]
    )


def test_a_wrong_key_is_named_with_its_arms(tmp_path):
    problem = problem_of(
        tmp_path, axes={"a": {"good": [], "bad": ["phases.1.transition.optimiser=reset"]}}, seeds=[0, 1]
    )
    lines = problem.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "arms 16-bit_a-bad_seed-0, 16-bit_a-bad_seed-1, scratch_a-bad_seed-0 and 3 more: "
        "phases.1.transition.optimiser: unknown key; did you mean optimizer?"
    )


def test_what_is_wrong_in_all_arms_is_said_once(tmp_path):
    problem = problem_of(tmp_path, overrides=["optimizer.learning_rate=0"], seeds=[0, 1])
    assert problem == "all arms: optimizer.learning_rate: is 0.0; must be above 0"


def test_what_does_not_fit_one_plan_is_named_with_its_arm(tmp_path):
    ramp = {"none": [], "long": ["phases.1.transition.ramp={shape: linear, steps: 5}"]}
    problem = problem_of(tmp_path, switch=[0.25, 0.5], axes={"ramp": ramp})
    assert problem == "arm switch-50_ramp-long: phases.1.transition.ramp.steps: is 5, longer than the phase's 4"


def test_values_that_make_no_difference_are_refused(tmp_path):
    problem = problem_of(tmp_path, axes={"a": {"x": [], "y": ["optimizer.weight_decay=0.1"]}})
    assert problem == "axes: the arms a-x and a-y are the same run; leave one of them out"


def test_arms_have_folders_of_their_own(tmp_path):
    problem = problem_of(tmp_path, {"checkpoint": {"folder": "elsewhere"}})
    assert problem.startswith("all arms: checkpoint.folder: must be null")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"axis": {}}, "axis: unknown key; did you mean axes?"),
        ({"axes": {"seed": {"a": []}}}, "axes.seed: is no name for an axis"),
        ({"axes": {"tokens": {"a": []}}}, "axes.tokens: is no name for an axis"),
        ({"axes": {"seeds": {"a": []}}}, "axes.seeds: is no name for an axis"),  # a column of the report
        ({"axes": {"excess_mine": {"a": []}}}, "axes.excess_mine: is no name for an axis"),
        ({"axes": {"a": {}}}, "axes.a: has no values"),
        ({"axes": {"a": {"b": "x=1"}}}, "axes.a.b: is 'x=1'; must be a list; write [x=1]"),
        ({"switch": [0.5, 1.0]}, "switch: is 0.5, 1.0; shares must be above 0 and below 1"),
        ({"seeds": []}, "seeds: is empty"),
        ({"seeds": [1, 1]}, "seeds: names a value twice"),
        ({"only": [{"stat": "keep"}]}, "only.0.stat: is no axis of this study; choose one of"),
        ({"exclude": [{"seed": 5}]}, "exclude.0.seed: names 5; the values are 0"),
        ({"sweep": {"rates": [1e-3]}}, "sweep.rates: needs two different learning rates or more"),
        ({"sweep": {"rates": [1e-3, 2e-3], "only": [{"x": 1}]}}, "sweep.only.0.x: is no axis of this study"),
        ({"sweep": {"rates": [1e-3, 2e-3], "only": [{"seed": 0}]}}, "sweep.only.0.seed: selects no arms to sweep"),
        ({"keep": "some"}, "keep: is 'some'; must be 'ends', 'all' or 'none'"),
        ({"base": "nowhere"}, "base: "),
        ({"only": [{"seed": 0, "baseline": "none"}], "exclude": [{"seed": 0}]}, "only, exclude: leave no arm"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_in_a_sentence(tmp_path, keys, said):
    lines = problem_of(tmp_path, **keys).splitlines()
    assert len(lines) == 1
    assert lines[0].removeprefix(f"{tmp_path / 'study.yaml'}: ").startswith(said), lines


def test_a_switch_needs_two_phases(tmp_path):
    problem = problem_of(tmp_path, {"phases": [{"precision": "16-bit", "steps": 4}]}, switch=[0.5])
    assert problem.startswith("all arms: switch: needs a base with two phases, 16-bit and ternary")


def test_a_switch_of_a_run_in_tokens(tmp_path):
    phases = [{"precision": "16-bit", "tokens": 1024}, {"precision": "ternary", "tokens": 1024}]
    (arm,) = arms_of(tmp_path, {"phases": phases}, switch=[0.75], baselines=[])
    assert [phase.end for phase in arm.plan.phases] == [6, 8]


def test_values_of_an_axis_may_be_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer: {learning_rate: 0.25}\n")
    recipe = {"mine": ["mine.yaml"], "muon": ["recipes/muon.yaml", "training.total_steps=20"]}
    mine, muon = arms_of(tmp_path, axes={"recipe": recipe}, baselines=[])
    assert (mine.config.optimizer.learning_rate, mine.config.optimizer.name) == (0.25, "adamw")
    assert muon.config.optimizer.name == "muon"
    assert [phase.end for phase in muon.plan.phases] == [14, 20]


def test_a_file_of_values_that_is_not_there(tmp_path):
    said = problem_of(tmp_path, axes={"recipe": {"mine": ["recipes/none.yaml"]}})
    assert "axes.recipe.mine: " in said
    assert "recipes/none.yaml does not exist" in said
    assert "shipped: cooldown-fusion, late-switch, muon," in said


SHIPPED_STUDIES = sorted((SHIPPED / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED_STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_worth_its_hours(path, tmp_path, capfd):
    out = tmp_path / "out"
    assert study(path, out, OPTIONS, Console(silent=False)) == 0
    said = capfd.readouterr().out
    assert re.search(r"arms and \d+ trunks: [\d,]+ steps instead of [\d,]+ .* sharing saves [2-9]\d%", said)
    warned = ["WARNING: the arms have 4.1 M to 6.14 M tokens"] if path.stem == "least-data" else []
    assert re.findall("WARNING: [^;]*", said) == warned
    assert not out.exists()
    text = path.read_text()
    assert f"tritrain study configs/studies/{path.name} --out runs/{path.stem} --dry-run" in text


def test_the_study_of_switch_points_has_its_trunks(tmp_path):
    path = SHIPPED / "studies" / "switch-point.yaml"
    arms = make_arms(*load_study(path, SHIPPED), tmp_path, 1)
    assert len(arms) == 48
    assert {arm.plan.total_tokens for arm in arms} == {4_096_000}
    sharing = share(arms)
    assert sharing.partings == ()
    assert [trunk.end for trunk in sharing.trunks] == [200, 500, 700, 800, 900] * 3


def test_a_shipped_configuration_is_found_by_its_name(tmp_path):
    (arm,) = arms_of(tmp_path, base="quickstart", baselines=[])
    assert arm.config.model.vocab_size == 2048


def test_baselines_of_axes_that_vary_together_are_all_there(tmp_path):
    """Each size has a rate of its own, so no two points differ in one of the two axes alone."""
    axes = {
        "size": {"small": ["model.intermediate_size=80"], "big": ["model.intermediate_size=96"]},
        "speed": {"high": ["optimizer.learning_rate=8e-3"], "low": ["optimizer.learning_rate=4e-3"]},
    }
    exclude = [{"size": "small", "speed": "low"}, {"size": "big", "speed": "high"}]
    arms = arms_of(tmp_path, axes=axes, exclude=exclude, seeds=[0, 1], baselines=["16-bit"])
    expected = {("small", "high"): (80, 8e-3), ("big", "low"): (96, 4e-3)}
    assert [arm.name for arm in arms] == [
        f"{kind}size-{size}_speed-{speed}_seed-{seed}"
        for kind in ("16-bit_", "")
        for size, speed in expected
        for seed in (0, 1)
    ]
    for arm in arms:
        made = arm.config.model.intermediate_size, arm.config.optimizer.learning_rate
        assert made == expected[arm.point["size"], arm.point["speed"]]


def test_complete_runs_that_a_file_no_longer_names_are_named(tmp_path, capfd):
    """With a second seed, names have the seed, so the arms of the first one would be trained again."""
    out = tmp_path / "out"
    for seeds in ([0], [0, 1]):
        path = write_study(tmp_path, Path("shards"), switch=[0.25, 0.5], seeds=seeds, baselines=[])
        assert study(path, out, OPTIONS, Console(silent=False)) == 0
        said = capfd.readouterr().out
        for name in ("switch-25", "switch-50"):
            (out / "arms" / name).mkdir(parents=True, exist_ok=True)
            status = "complete" if name == "switch-25" else "interrupted"
            (out / "arms" / name / "state.json").write_text(f'{{"status": "{status}"}}')
    assert "WARNING: arms/ has complete runs that this file gives no such name: switch-25;" in said


def test_a_renamed_folder_is_that_of_its_arm(tmp_path):
    """As the warning above advises; the run in it goes on under its new name."""
    folder = make_study(tmp_path / "study", lambda arm: 3.0, seeds=[0], baselines=[])
    (folder / "arms" / "arm").rename(folder / "arms" / "seed-0")
    path = write_study(folder / "files", folder / "shards", seeds=[0, 1], baselines=[])
    arms = make_arms(*load_study(path, folder), folder, 1)
    there = read_tree(folder / "arms" / "seed-0" / "config.yaml")
    assert there is not None
    del there["tritrain_version"]
    assert [(change.key, change.is_allowed) for change in changes(there, arms[0].config)] == [("run.name", True)]
    assert [RunFolder(arm.config).is_complete(arm.plan.total_steps) for arm in arms] == [True, False]


def test_a_study_without_held_out_text_has_no_result_and_is_refused(tmp_path):
    problem = problem_of(tmp_path, {"data": {"validation_rows": 0}})
    assert problem == "all arms: data.validation_rows: is 0; a study compares held-out losses, so it must be above 0"


def test_a_baseline_with_swept_rates_is_told_from_one_of_another_schedule(tmp_path):
    """The sweep is of one schedule alone, so that no two baselines differ in nothing but the schedule."""
    axes = {"decay": {"late": [], "whole": ["schedule={shape: cosine, warmup_steps: 2}"]}}
    sweep = {"rates": [1e-3, 2e-3], "only": [{"baseline": ["16-bit"], "decay": "late"}]}
    arms = arms_of(tmp_path, axes=axes, sweep=sweep, baselines=["16-bit"])
    assert [(arm.name, arm.config.schedule.shape) for arm in arms if arm.baseline == "16-bit"] == [
        ("16-bit_decay-late_rate-0.001", "wsd"),
        ("16-bit_decay-late_rate-0.002", "wsd"),
        ("16-bit_decay-whole", "cosine"),
    ]


def test_a_baseline_stands_for_all_arms_that_have_it_left_out_or_not(tmp_path):
    """Which optimizer state an arm keeps makes no difference in 16 bits, the decay does."""
    axes = {
        "decay": {"late": [], "whole": ["schedule={shape: cosine, warmup_steps: 2}"]},
        "state": {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]},
    }
    sweep = {"rates": [1e-3, 2e-3], "only": [{"baseline": ["16-bit"]}]}
    exclude = [{"baseline": "16-bit", "decay": "whole"}, {"baseline": "16-bit", "state": "reset"}]
    arms = arms_of(tmp_path, axes=axes, sweep=sweep, exclude=exclude, baselines=["16-bit"])
    dense = [arm for arm in arms if arm.baseline == "16-bit"]
    assert [arm.name for arm in dense] == ["16-bit_rate-0.001", "16-bit_rate-0.002"]
    expected = [{"decay": "late", "state": "keep"}, {"decay": "late", "state": "reset"}]
    assert [list(arm.stands_for) for arm in dense] == [expected, expected]
    assert [arm.stands_for for arm in arms if arm.baseline != "16-bit"] == [()] * 4
