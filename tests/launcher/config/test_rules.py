"""What a configuration may not combine, and how all its problems are told at once."""

import inspect
from dataclasses import replace
from typing import get_type_hints

import pytest
from minimal import only_problem, problems, tree

from launcher.config import effects, rules
from launcher.config.file import parse_config, parse_yaml, to_tree
from launcher.config.rules import RULES, RULES_TO_START
from launcher.config.sections import Config
from launcher.errors import ConfigError

# Rules


@pytest.mark.parametrize(
    ("overrides", "path", "said"),
    [
        (["training.global_batch_tokens=32"], "training.global_batch_sequences", "give exactly one of"),
        (["training.global_batch_sequences=null"], "training.global_batch_sequences", "give exactly one of"),
        (["training.total_steps=5", "training.total_tokens=9"], "training.total_steps", "give at most one of"),
        (["training.micro_batch_sequences=0"], "training.micro_batch_sequences", "is 0; must be 1 or more"),
        (["training.global_batch_sequences=0"], "training.global_batch_sequences", "is 0; must be 1 or more"),
        (["training.total_steps=0"], "training.total_steps", "is 0; must be 1 or more"),
        (["training.total_tokens=-1"], "training.total_tokens", "is -1; must be 1 or more"),
        (["training.max_skipped_steps=0"], "training.max_skipped_steps", "is 0; must be 1 or more"),
        (["phases.0.tokens=5"], "phases.0.steps", "give exactly one of steps, tokens and fraction, not steps and tok"),
        (["phases.0.steps=null"], "phases.0.steps", "give exactly one of steps, tokens and fraction, not none"),
        (["phases.0.steps=0"], "phases.0.steps", "is 0; must be 1 or more"),
        (["phases.0.steps=null", "phases.0.tokens=0"], "phases.0.tokens", "is 0; must be 1 or more"),
        (["phases.0.steps=null", "phases.0.fraction=1.5", "training.total_steps=9"], "phases.0.fraction", "is 1.5;"),
        (["phases.0.steps=null", "phases.0.fraction=0.0", "training.total_steps=9"], "phases.0.fraction", "is 0.0;"),
        (["phases.0.quantization={}"], "phases.0.quantization", "is given for a 16-bit phase"),
        (["phases.0.transition.ramp.steps=2"], "phases.0.transition.ramp", "is given for a 16-bit phase"),
        (
            ["phases.0.transition.calibration.sequences=4"],
            "phases.0.transition.calibration",
            "is given for a 16-bit phase; only ternary phases have codes",
        ),
        (
            ["phases.0.precision=ternary", "phases.1.transition.calibration.sequences=4"],
            "phases.1.transition.calibration",
            "fits codes to 16-bit weights, but the phase before is ternary; leave it out",
        ),
        (["phases.1.transition.ramp.steps=-1"], "phases.1.transition.ramp.steps", "is -1; 0 (switch at once) or more"),
        (["phases.1.transition.rewarm_tokens=-1"], "phases.1.transition.rewarm_tokens", "is -1; must be 0 or more"),
        (["phases.1.quantization.include=(("], "phases.1.quantization.include", "'((' is not a regular expression"),
        (["phases.1.quantization.include=lm_head"], "phases.1.quantization.include", "'lm_head' matches no layer"),
        (["phases=[]"], "phases", "is empty; list at least one phase"),
        (["checkpoint.interval_steps=0"], "checkpoint.interval_steps", "is 0; must be 1 or more"),
        (["checkpoint.keep_last=1"], "checkpoint.keep_last", "is 1; 0 (keep all) or at least 2"),
        (["checkpoint.keep_last=-1"], "checkpoint.keep_last", "is -1; 0 (keep all) or at least 2"),
        (["logging.interval_steps=0"], "logging.interval_steps", "is 0; must be 1 or more"),
        (["evaluation.interval_steps=0"], "evaluation.interval_steps", "is 0; must be 1 or more"),
        (["evaluation.sample_tokens=0"], "evaluation.sample_tokens", "is 0; must be 1 or more"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate", "is 0.0; must be above 0"),
        (["optimizer.eps=0"], "optimizer.eps", "is 0.0; must be above 0"),
        (["optimizer.max_grad_norm=-1"], "optimizer.max_grad_norm", "is -1.0; must be above 0"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay", "is -1.0; must be 0 or more"),
        (["optimizer.betas=[1, 0.9]"], "optimizer.betas", "is [1.0, 0.9]; both must be 0 or more and below 1, such as"),
        (["schedule.warmup_steps=-1"], "schedule.warmup_steps", "is -1; must be 0 or more"),
        (["schedule.final_fraction=1.1"], "schedule.final_fraction", "is 1.1; must be between 0 and 1"),
        (["schedule.decay_fraction=0"], "schedule.decay_fraction", "is 0.0; must be above 0"),
        (["schedule.warmup_steps=3", "schedule.horizon_steps=3"], "schedule.horizon_steps", "is 3; must be above warm"),
        (["engine.replicas=0"], "engine.replicas", "is 0; 1 (full sharding) or more"),
        (["engine.timeout_seconds=0"], "engine.timeout_seconds", "is 0; must be 1 or more"),
        (["watch.beat_seconds=0"], "watch.beat_seconds", "is 0; must be above 0"),
        (["watch.lost_seconds=5"], "watch.lost_seconds", "is 5; must be 3 beats, 6, or more"),
        (["watch.step_seconds=0"], "watch.step_seconds", "is 0; must be above 0"),
        (["engine.name=deepspeed"], "engine.zero_stage", "is missing; engine.name deepspeed needs 0, 1, 2 or 3"),
        (["engine.zero_stage=2"], "engine.zero_stage", "is 2; only engine.name deepspeed has stages"),
        (["engine.deepspeed={}"], "engine.deepspeed", "is given; only engine.name deepspeed takes it"),
        (["engine.offload=optimizer"], "engine.offload", "is optimizer; with fsdp2 choose all or none"),
        (["model.num_heads=3"], "model.num_heads", "3 does not divide hidden_size 16"),
        (["run.folder=~/runs/a"], "run.folder", "'~/runs/a' would be a folder named '~'; write '/"),
        (["run.folder=s3://b/a"], "run.folder", "'s3://b/a' is a URL; give a folder on this machine's"),
        (["checkpoint.folder=~/a"], "checkpoint.folder", "'~/a' would be a folder named '~'"),
        (["data.cache=~/a"], "data.cache", "'~/a' would be a folder named '~'"),
        (["data.sources.0.path=~/a"], "data.sources.0.path", "'~/a' would be a folder named '~'"),
        (["data.sources=[]"], "data.sources", "is empty; name at least one prepared folder"),
        (["phases.1.sources=[]"], "phases.1.sources", "is empty; name at least one prepared folder"),
        (["phases.1.sources=[{path: a}, {path: a}]"], "phases.1.sources", "names a more than once; add the weights"),
        (["phases.1.sources=[{path: a}, {path: ''}]"], "phases.1.sources.1.path", "is empty; give the folder that"),
        (["phases.1.sources=[{path: a, weights: 1}]"], "phases.1.sources.0.weights", "unknown key; did you mean weig"),
        (["phases.1.sources=[{path: ~/a}]"], "phases.1.sources.0.path", "'~/a' would be a folder named '~'"),
        (["phases.1.sources=[{path: 's3://b/a'}]"], "data.cache", "is needed for phases.1.sources.0, which is remote"),
        (["phases.1.sources=a"], "phases.1.sources", "is 'a'; must be a list"),
        (["phases.1.dataset=a"], "phases.1.dataset", "unknown key; did you mean phases.1.sources?"),
        (["phases.1.sequence_length=3"], "phases.1.sequence_length", "is 3; must divide data.sequence_length 8 and be "
         "below it, such as 4, 2, 1; rows are as long as the longest phase needs"),
        (["phases.1.sequence_length=16"], "phases.1.sequence_length", "is 16; must divide data.sequence_length 8"),
        (["phases.1.sequence_length=0"], "phases.1.sequence_length", "is 0; must be 1 or more"),
        (["data.sources.0.weight=0"], "data.sources.0.weight", "is 0.0; must be above 0"),
        (["data.sequence_length=4096"], "data.sequence_length", "is 4096; must be at most model.max_sequence_length"),
        (["training.micro_batch_sequences=3"], "training.micro_batch_sequences", "3 does not divide the global "
         "batch of 4 sequences; choose 1, 2, 4"),
        (["training.global_batch_sequences=null", "training.global_batch_tokens=20"], "training.global_batch_tokens",
         "is 20; must be a multiple of data.sequence_length 8, such as 16 or 24"),
        (["training.global_batch_sequences=null", "training.global_batch_tokens=3"], "training.global_batch_tokens",
         "is 3; must be a multiple of data.sequence_length 8, such as 8"),
        (["phases.0={precision: 16-bit, fraction: 0.5}"], "phases.0.fraction", "needs training.total_steps or"),
        (["training.total_steps=10"], "training.total_steps", "has no effect, because no phase's length is a fraction"),
        (["training.total_tokens=999"], "training.total_tokens", "has no effect, because no phase's length is a frac"),
        (["phases.0.transition.optimizer=reset"], "phases.0.transition", "has nothing to carry over in the first ph"),
        (["phases.0.transition.data=restart"], "phases.0.transition", "has nothing to carry over in the first ph"),
    ],
)  # fmt: skip
def test_impossible_combination(overrides, path, said):
    assert only_problem(*overrides)[0] == path
    assert only_problem(*overrides)[1].startswith(said)


DEEPSPEED = ["engine.name=deepspeed", "engine.zero_stage=2"]


@pytest.mark.parametrize(
    ("overrides", "path", "said"),
    [
        (["engine.replicas=2"], "engine.replicas", "belongs to fsdp2"),
        (["engine.reshard_after_forward=false"], "engine.reshard_after_forward", "belongs to fsdp2"),
        (["engine.offload=all"], "engine.offload", "is all, which needs zero_stage 3"),
        (["engine.zero_stage=0", "engine.offload=optimizer"], "engine.offload", "is optimizer, which needs zero_stage"),
        (["engine.deepspeed={bf16: {enabled: true}}"], "engine.deepspeed.bf16.enabled", "set training.compute_dtype"),
        (["engine.deepspeed={optimizer: {}}"], "engine.deepspeed.optimizer", "set optimizer instead"),
        (["engine.deepspeed={gradient_clipping: 1}"], "engine.deepspeed.gradient_clipping", "optimizer.max_grad_norm"),
        (["engine.deepspeed={zero_optimization: {stage: 3}}"], "engine.deepspeed.zero_optimization.stage",
         "set engine.zero_stage instead"),
        (["engine.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
         "engine.deepspeed.zero_optimization.offload_optimizer.device", "set engine.offload instead"),
        (["engine.deepspeed={train_batch_size: 4}"], "engine.deepspeed.train_batch_size",
         "set training.global_batch_sequences instead"),
        (["engine.deepspeed={zero_optimization: {cpu_offload: true}}"],
         "engine.deepspeed.zero_optimization.cpu_offload", "set engine.offload instead"),
        (["engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
         "engine.deepspeed.zero_optimization.round_robin_gradients", "is True, but DeepSpeed's tables do not"),
        (["engine.deepspeed={zero_optimization: {zero_hpz_partition_size: 2}}"],
         "engine.deepspeed.zero_optimization.zero_hpz_partition_size", "a second partition of the weights is not"),
        (["engine.deepspeed={zero_optimization: {zenflow: {topk_ratio: 0.1}}}"],
         "engine.deepspeed.zero_optimization.zenflow.topk_ratio", "its delayed updates are not in a checkpoint"),
        (["engine.deepspeed={zero_optimization: {compute_grad_norm: false}}"],
         "engine.deepspeed.zero_optimization.compute_grad_norm", "the gradient norm is needed"),
        (["engine.deepspeed={zero_optimization: {mics_shard_size: 2}}"],
         "engine.deepspeed.zero_optimization.mics_shard_size", "sharded over some of the ranks are not supported"),
        (["engine.deepspeed={gradient_allreduce_op: sum}"],
         "engine.deepspeed.gradient_allreduce_op", "the gradient of a step is the mean over its tokens"),
        (["engine.deepspeed={zero_optimization: null}"], "engine.deepspeed.zero_optimization", "must be a mapping"),
        (["engine.deepspeed={zero_optimization: true}"], "engine.deepspeed.zero_optimization", "must be a mapping"),
        (["engine.deepspeed={sequence_parallel_size: 2}"], "engine.deepspeed.sequence_parallel_size", "sequences of"),
        (["engine.deepspeed={tensor_parallel: {autotp_size: 2}}"], "engine.deepspeed.tensor_parallel.autotp_size",
         "it changes the model, its batches or its state"),
        (["engine.deepspeed={progressive_layer_drop: {enabled: true}}"],
         "engine.deepspeed.progressive_layer_drop.enabled", "it changes the model"),
        (["engine.deepspeed={elasticity: {}}"], "engine.deepspeed.elasticity", "it changes the model, its batches"),
    ],
)  # fmt: skip
def test_deepspeed_contradictions_name_our_key(overrides, path, said):
    where, text = only_problem(*DEEPSPEED, *overrides)
    assert where == path
    assert said in text


def test_deepspeed_keys_pass_through():
    zero = "{overlap_comm: true, reduce_bucket_size: 1000, round_robin_gradients: false}"
    extra = f"engine.deepspeed={{zero_optimization: {zero}, steps_per_print: 5}}"
    config = parse_config(tree(*DEEPSPEED, extra))
    assert config.engine.deepspeed == {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000, "round_robin_gradients": False},
        "steps_per_print": 5,
    }


@pytest.mark.parametrize(
    ("model", "include", "matches"),
    [
        ("model.tie_embeddings=false", "lm_head", False),
        ("model.tie_embeddings=false", "(_proj|head)$", False),
        ("model.tie_embeddings=true", "(_proj|head)$", True),
        ("model.tie_embeddings=true", "lm_head", False),
        ("model.tie_embeddings=false", "embed_tokens", False),
        ("model.sub_norm=true", "down_proj", True),
        ("model.sub_norm=true", "nothing", False),
    ],
)
def test_pattern_must_match_a_layer(model, include, matches):
    overrides = (model, f"phases.1.quantization.include={include}")
    if matches:
        parse_config(tree(*overrides))
    else:
        assert only_problem(*overrides)[0] == "phases.1.quantization.include"


def test_fractions_are_of_one_run():
    both = ["training.total_steps=10", "phases.0.steps=null", "phases.1.steps=null", "phases.0.fraction=0.7"]
    parse_config(tree(*both, "phases.1.fraction=0.3"))
    parse_config(tree(*both, "phases.1.fraction=rest"))
    advice = "not to 1; change one, or write fraction: rest for one"
    assert only_problem(*both, "phases.1.fraction=0.1") == ("phases", f"the fractions add up to 0.8, {advice}")
    assert only_problem(*both, "phases.1.fraction=0.4") == ("phases", f"the fractions add up to 1.1, {advice}")


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["training.total_steps=10", "phases.0={precision: 16-bit, fraction: 0.2}",
          "phases.1={precision: ternary, fraction: 0.6}"], "phases"),
        ([*DEEPSPEED, "engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
         "engine.deepspeed.zero_optimization.round_robin_gradients"),
        ([*DEEPSPEED, "engine.deepspeed={zero_optimization: {cpu_offload: true}}"],
         "engine.deepspeed.zero_optimization.cpu_offload"),
        (["evaluation.task_data=s3://me:secret@bucket/tasks"], "evaluation.task_data"),
    ],
)  # fmt: skip
def test_what_a_run_may_not_start_with_is_still_read_where_one_has_left_it(overrides, path):
    assert only_problem(*overrides)[0] == path
    config = parse_config(tree(*overrides), stored=True)
    with pytest.raises(ConfigError, match=f"^{path}: "):
        parse_config(to_tree(config))
    with pytest.raises(ConfigError, match=r"training\.micro_batch_sequences: 3 does not divide"):
        parse_config(tree(*overrides, "training.micro_batch_sequences=3"), stored=True)


def test_one_phase_takes_the_rest():
    both = ["training.total_steps=10", "phases.0.steps=null", "phases.1.steps=null", "phases.0.fraction=rest"]
    assert only_problem(*both, "phases.1.fraction=rest")[1].startswith("fraction is rest in more than one")
    assert only_problem(*both, "phases.1.fraction=1.0")[1].endswith("leave nothing for the one that is rest")
    assert only_problem("phases.0.steps=null", "phases.0.fraction=rest")[0] == "phases.0.fraction"


@pytest.mark.parametrize("wrong", ["half", "true", "[0.5]", "'0.5'"])
def test_a_value_of_no_kind_that_a_key_takes_is_one_problem(wrong):
    both = ["training.total_steps=10", "phases.0.steps=null", "phases.1={precision: ternary, fraction: rest}"]
    path, said = only_problem(*both, f"phases.0.fraction={wrong}")
    assert path == "phases.0.fraction"
    assert said.endswith("; must be a valid number or 'rest'")


def test_first_phase_may_have_a_ramp_or_a_start():
    first = ["phases.0={precision: ternary, steps: 4, transition: {ramp: {steps: 2}}}"]
    parse_config(tree(*first))
    parse_config(tree("checkpoint.start_from=x", "phases.0.transition.optimizer=reset"))
    assert only_problem(*first, "phases.0.transition.schedule=restart")[0] == "phases.0.transition"


@pytest.mark.parametrize("key", ["ramp", "activation_ramp"])
def test_sensitivity_needs_a_model_to_measure(key):
    ramps = f"phases.0={{precision: ternary, steps: 4, transition: {{{key}: {{steps: 2, order: sensitivity}}}}}}"
    path, said = only_problem(ramps)
    assert path == f"phases.0.transition.{key}.order"
    assert said.startswith("is sensitivity, but there is no trained model to measure")
    parse_config(tree(ramps, "checkpoint.start_from=x"))


SOFT = "phases.1.transition.ramp={steps: 2, rounding: softmax}"


@pytest.mark.parametrize(
    ("overrides", "path", "said"),
    [
        (
            ["phases.1.quantization={levels: binary}"],
            "ramp.rounding",
            "is softmax, which is for levels ternary, not bi",
        ),
        (["phases.1.quantization={levels: int2}"], "ramp.rounding", "is softmax, which is for levels ternary, not int"),
        (["phases.1.quantization={preset: paretoq}"], "ramp.rounding", "is softmax, but learned scales get no gradie"),
        (
            ["phases.1.transition.activation_ramp={steps: 1, rounding: softmax}"],
            "activation_ramp.rounding",
            "is softmax, which is for weights; set ramp.rounding instead",
        ),
    ],
)
def test_soft_rounding_is_for_ternary_weights_with_their_own_scale(overrides, path, said):
    parse_config(tree(SOFT))
    found, problem = only_problem(SOFT, *overrides)
    assert found == f"phases.1.transition.{path}"
    assert problem.startswith(said)


# All at once


def test_all_problems_at_once_across_and_within_sections():
    found = problems(
        "run.nam=x",
        "model.num_heads=3",
        "model.z_loss=-1",
        "data.sequence_lenght=4",
        "training.micro_batch_sequences=3",
        "training.max_skipped_steps=0",
        "optimizer.learning_rate=fast",
        "optimizer.weight_decay=-1",
        "phases.0.steps=0",
        "phases.1.precision=8-bit",
        "phases.1.quantization.include=((",
        "schedul={}",
        "checkpoint.keep_last=1",
    )
    assert list(found) == [
        "run.nam", "model.z_loss", "data.sequence_lenght", "training.max_skipped_steps",
        "optimizer.learning_rate", "phases.0.steps", "phases.1.precision", "phases.1.quantization.include",
        "schedul", "checkpoint.keep_last",
    ]  # fmt: skip


def test_a_malformed_key_does_not_hide_what_else_is_wrong_in_its_part():
    found = problems("schedule.warmup_steps=x", "schedule.final_fraction=2", "schedule.typo=1", "schedule.shape=round")
    assert set(found) == {f"schedule.{key}" for key in ("warmup_steps", "final_fraction", "typo", "shape")}
    found = problems("phases.1.transition.rewarm_tokens=-1", "phases.1.tokens=4")
    assert set(found) == {"phases.1.transition.rewarm_tokens", "phases.1.steps"}


def test_problems_are_in_the_order_of_the_file():
    """Whatever a part is checked for first; what is missing comes last where it should be."""
    changed = parse_yaml(
        """
        phases: [{transition: {optimizer: reset}, precision: 16-bit, fraction: 0.5}, {steps: 0, tokenz: 1}]
        watch: {lost_seconds: 1, beat_seconds: 0}
        modle: {}
        data: {workers: -1, sources: [{path: a}], sequence_length: 8, shuffle_seed: -1}
        training: {max_skipped_steps: x, micro_batch_sequences: 0, global_batch_sequences: 1}
        run: {seed: x}
        """,
        "here",
    )
    with pytest.raises(ConfigError) as caught:
        parse_config(changed)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "phases.1.tokenz", "phases.1.precision", "watch.beat_seconds", "modle", "data.workers", "data.shuffle_seed",
        "training.max_skipped_steps", "training.micro_batch_sequences", "run.seed", "run.name", "model", "optimizer",
    ]  # fmt: skip


def test_a_rule_needs_sections_and_says_what_for():
    types = get_type_hints(Config)
    every = (*RULES, *RULES_TO_START)
    names = {rule.__name__ for rule in every}
    assert len(names) == len(every)
    for rule in every:
        assert inspect.signature(rule).parameters.keys() <= types.keys(), rule
        assert rule.__doc__
    assert names == {
        name
        for name, function in (vars(rules) | vars(effects)).items()
        if inspect.isgeneratorfunction(function) and not name.startswith("_")
    }


@pytest.mark.parametrize("overrides", [(), ("training.micro_batch_sequences=3",), ("run.nam=x",)])
def test_rules_run_once(overrides, monkeypatch):
    calls = []

    def counted(training):
        calls.append(training)
        return iter(())

    monkeypatch.setattr(rules, "RULES", (*RULES, counted))
    if overrides:
        problems(*overrides)
    else:
        parse_config(tree())
    assert len(calls) == 1


def test_rules_of_valid_parts_run_beside_problems_of_others():
    found = problems("training.micro_batch_sequences=3", "data.sequence_length=4096", "logging.interval_steps=0")
    assert set(found) == {"training.micro_batch_sequences", "data.sequence_length", "logging.interval_steps"}


def test_a_configuration_built_in_python_obeys_the_same_rules():
    config = parse_config(tree())
    with pytest.raises(ValueError, match="does not divide") as caught:
        replace(config, training=replace(config.training, micro_batch_sequences=3))
    assert set(caught.value.args[0]) == {"training.micro_batch_sequences"}


def test_problems_of_several_valid_sections_are_all_told():
    found = problems("data.sequence_length=4096", "training.micro_batch_sequences=3", "phases.1.quantization.include=x")
    assert set(found) == {
        "data.sequence_length",
        "training.micro_batch_sequences",
        "phases.1.quantization.include",
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["phases.0.steps=x"],
        ["phases.0.steps=null", "phases.0.tokens=1.5"],
        ["training.global_batch_sequences=1.5"],
        ["engine.name=deepspeed", "engine.zero_stage=5"],
        ["engine.zero_stage=2", "engine.name=deepsped"],
        ["model.hidden_size=18", "model.num_heads=4", "model.head_dim=x"],
        ["training.total_steps=1.5", "phases.0={precision: 16-bit, fraction: 1.0}"],
        ["phases.0.transition.optimizer=reset", "checkpoint.start_from=5"],
        ["data.sequence_length=4096", "model.max_sequence_length='4096'"],
        ["run.name=5"],
        ["phases.1.transition={ramp: 5, optimizer: reset}"],
        ["training.global_batch_sequences=null", "training.global_batch_tokens=x"],
        ["training.skip_outliers={sigmas: x, window_steps: 20}"],
        ["schedule={shape: round, drop_at: 0.5, drop_factor: 0.5}"],
        ["phases.1.quantization={levels: int5, weights: learned, granularity: row}"],
        ["phases.1.quantization={preset: pareto, weights: learned}"],
        ["phases.1.transition={optimizer: scale, rescale_factor: 2.0}"],
        ["phases.1.transition.ramp={shape: stairs, stairs: 4}"],
        ["phases.1.transition.ramp={shape: s, sharpness: 4.0}"],
        ["phases.1.transition.ramp={steps: 1.5, order: front-to-back}"],
        ["phases.1.distillation={relation_weight: x, relation_layer: 0}"],
        ["engine.name=deepsped", "engine.deepspeed={}"],
        ["engine.name=deepsped", "engine.offload=optimizer"],
        ["engine={name: deepspeed, zero_stage: 5, offload: all}"],
        ["checkpoint.start_from=5", "checkpoint.start_phase=1"],
        ["evaluation={tasks: piqa, tasks_interval_steps: 5}"],
        ["watch={beat_seconds: x, lost_seconds: 5.0}"],
    ],
)
def test_a_malformed_key_is_the_only_problem_it_causes(overrides):
    """No complaint that the key's value, had it been well-formed, could have made untrue."""
    path, text = only_problem(*overrides)
    assert text.startswith("is ")
    assert "must be" in text
    assert overrides[-1].split("=")[0] in path or overrides[0].split("=")[0] in path


def test_missing_keys_and_sections():
    changed = tree("model={vocab_size: 64}")
    del changed["phases"], changed["optimizer"]["learning_rate"]
    with pytest.raises(ConfigError) as caught:
        parse_config(changed)
    assert str(caught.value).splitlines() == [
        "model.hidden_size: is missing",
        "model.num_layers: is missing",
        "model.num_heads: is missing",
        "model.intermediate_size: is missing",
        "optimizer.learning_rate: is missing",
        "phases: the section is missing",
    ]
