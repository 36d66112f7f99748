"""Keys that would do nothing, lengths that nobody can mean, and allowances for keys that do not exist."""

import json
from dataclasses import fields

import pytest
from minimal import only_problem, tree

from launcher.config.advice import known_part, no_such_key
from launcher.config.file import flat_lines, parse_config, to_tree

TASKS = ["evaluation.tasks=[piqa]", "evaluation.tasks_interval_steps=5"]
GROUP = "phases.1.quantization.granularity=group"
TEACHER = "phases.1.distillation.teacher=t"
RAMP = "phases.1.transition.ramp"


@pytest.mark.parametrize(
    ("override", "others", "cures", "reason"),
    [
        ("phases.1.quantization.group_size=8", [], [GROUP], "granularity is matrix; for groups, set granularity: gro"),
        ("phases.1.quantization.group_size=8", ["phases.1.quantization.granularity=row"], [GROUP], "granularity is"),
        (f"{RAMP}.shape=tanh", [], [f"{RAMP}.steps=3"], "steps is 0, which switches at once; leave it out"),
        (f"{RAMP}.shape=tanh", [], ["phases.1.transition.rollback={after_tokens: 64}"], "steps is 0"),
        ("phases.1.transition.activation_ramp.shape=cosine", [f"{RAMP}.steps=3"],
         ["phases.1.transition.activation_ramp.steps=2"], "steps is 0"),
        ("model.sub_norm_init=0.5", [], ["model.sub_norm=true"], "model.sub_norm is false; leave it out"),
        ("model.init_std=0.5", ["model.initialization=mitchell"], ["model.initialization=normal"], "model.initializa"),
        ("data.shuffle_block_rows=8", ["data.shuffle=false"], ["data.shuffle=true"], "data.shuffle is false"),
        ("data.sources.0.weight=2", [], ["data.sources=[{path: a, weight: 2}, {path: b}]"], "there is no other source"),
        ("phases.1.sources.0.weight=2", ["phases.1.sources=[{path: a}]"],
         ["phases.1.sources=[{path: a, weight: 2}, {path: b}]"], "there is no other source"),
        ("schedule.decay_fraction=0.5", [], ["schedule.shape=wsd"], "schedule.shape is cosine, not wsd"),
        ("schedule.final_fraction=0.5", ["schedule.shape=constant"], ["schedule.shape=linear"], "schedule.shape is"),
        ("schedule.horizon_steps=5", ["schedule.shape=constant"], ["schedule.shape=linear"], "schedule.shape is const"),
        ("optimizer.decay_embeddings=false", ["optimizer.weight_decay=0"], ["optimizer.weight_decay=1"],
         "optimizer.weight_decay is 0"),
        ("evaluation.sample_tokens=5", [], ["evaluation.sample_prompts=[a]"], "evaluation.sample_prompts is empty"),
        ("evaluation.task_data=here", [], TASKS, "evaluation.tasks is empty"),
        ("evaluation.tasks_limit=5", [], TASKS, "evaluation.tasks is empty"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_refused(override, others, cures, reason):
    path, said = only_problem(*others, override)
    assert path == override.split("=")[0]
    assert f", but has no effect, because {reason}" in said
    parse_config(tree(*others, override, *cures))
    stored = parse_config(tree(*others, override), stored=True)  # that of an earlier run is still read
    parse_config(to_tree(stored), stored=True)


def test_a_cache_may_be_for_compressed_shards_which_only_the_folder_shows():
    assert parse_config(tree("data.cache=here")).data.cache == "here"


@pytest.mark.parametrize(
    ("path", "enough", "said"),
    [
        ("watch.beat_seconds", 0.1, "must be 0.1 or more; the default is 2"),
        ("watch.step_seconds", 1, "must be 1 or more; the default is 300"),
        ("watch.first_step_seconds", 1, "must be 1 or more; the default is 1800"),
        ("checkpoint.interval_minutes", 0.01, "must be 0.01 or more; the default is 30"),
        ("evaluation.interval_minutes", 0.01, "must be 0.01 or more; the default is 30"),
        ("optimizer.weight_decay_until", 0.01, "must be 0.0001 or more"),
    ],
)
def test_a_length_that_nobody_can_mean_is_refused(path, enough, said):
    assert only_problem(f"{path}=1e-9") == (path, f"is 1e-09; {said}")
    parse_config(tree(f"{path}={enough}"))
    parse_config(tree(f"{path}=1e-9"), stored=True)


def test_a_share_that_is_no_step_is_refused():
    shares = ["training.total_steps=10", "phases.0.steps=null", "phases.1.steps=null", "phases.1.fraction=rest"]
    assert only_problem(*shares, "phases.0.fraction=1e-9")[0] == "phases.0.fraction"
    assert only_problem("schedule.shape=wsd", "schedule.decay_fraction=1e-9")[0] == "schedule.decay_fraction"
    assert only_problem("schedule.shape=two-stage", "schedule.drop_at=1e-9")[0] == "schedule.drop_at"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.learning_rte", "; did you mean learning_rate?"),
        ("optimiser", "; did you mean optimizer?"),
        ("lr", "; did you mean optimizer.learning_rate?"),
        ("phases.1.quantisation", "; did you mean quantization?"),
        ("phases.one", ""),
        ("optimizer.learning_rate.peak", ""),
        ("optimizer.", "; choose one of name, "),
    ],
)
def test_an_allowance_for_a_key_that_does_not_exist_is_refused(key, meant):
    path, said = only_problem(f"run.allow_changes={json.dumps(['phases', key])}")
    assert path == "run.allow_changes.1"
    assert said.startswith(f"{key!r} is no key or section of the configuration{meant}")
    assert meant or said.endswith("configuration")


def test_every_key_and_section_may_be_allowed_to_change():
    config = parse_config(
        tree("engine.name=deepspeed", "engine.zero_stage=1", "engine.deepspeed={zero_optimization: {x: 1}}", TEACHER)
    )
    keys = [line.split(": ")[0] for line in flat_lines(to_tree(config))]
    assert "optimizer.betas.1" in keys
    assert "engine.deepspeed.zero_optimization.x" in keys
    for key in (*keys, *(part.name for part in fields(config)), "phases.9", "phases.9.transition.ramp"):
        assert no_such_key(key) is None, key
    assert known_part("model.of_an_earlier_version") == "model"
    assert known_part("earlier.key") == ""
