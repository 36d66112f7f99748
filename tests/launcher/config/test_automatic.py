"""Keys that are `auto` become values: those of the device, or those that the run began with."""

from dataclasses import replace

import pytest
from minimal import tree

from launcher.config.automatic import ANY_GPU, Device, made_concrete, stored_values
from launcher.config.file import parse_config, to_tree
from launcher.errors import ConfigError

KEY = "training.compute_dtype"


def cpu(has_bf16):
    return Device("cpu", "this processor", has_bf16)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (ANY_GPU, "bf16, which a GPU computes in hardware"),
        (cpu(True), "bf16, which this processor computes in hardware"),
        (cpu(False), "fp32, because this processor only emulates bf16"),
        (cpu(None), "fp32, because this processor does not say whether it computes in bf16"),
    ],
)
def test_the_default_follows_from_the_device(device, said):
    config, sayings = made_concrete(parse_config(tree("training.compile=false")), device)
    assert sayings == {KEY: said}
    assert config == parse_config(tree("training.compile=false", f"{KEY}={said[:4]}"))
    assert made_concrete(config, cpu(False)) == (config, {})  # and does not change again


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_keeps_the_value_that_it_began_with(dtype):
    stored = stored_values(to_tree(parse_config(tree(f"{KEY}={dtype}"))))
    for device in (ANY_GPU, cpu(True), cpu(False)):
        config, sayings = made_concrete(parse_config(tree()), device, stored)
        assert sayings[KEY] == f"{dtype}, as this run began"
        assert config.training.compute_dtype == dtype


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_explicit_value_is_never_changed(dtype):
    config = parse_config(tree(f"{KEY}={dtype}", "training.compile=true"))
    for stored in (None, {KEY: "bf16"}, {KEY: "fp32"}):
        assert made_concrete(config, cpu(False), stored) == (config, {})


@pytest.mark.parametrize(
    ("stored", "values"),
    [
        (None, {}),
        ({}, {}),
        ({"training": "fast"}, {}),
        ({"training": {"compute_dtype": "auto"}}, {}),  # of a run that was converted and has not trained yet
        ({"training": {"compute_dtype": "fp16"}}, {}),
        ({"training": {"compute_dtype": ["fp32"]}}, {}),
        ({"training": {"compute_dtype": "fp32"}}, {KEY: "fp32"}),
        ({"training": {}}, {KEY: "bf16"}),  # of a version without the key
        ({"training": {"compute_dtype": "bf16", "compile": True}}, {KEY: "bf16", "training.compile": True}),
    ],
)
def test_values_are_read_from_what_a_run_has_stored(stored, values):
    without_the_key = {"training.compile": False} if isinstance((stored or {}).get("training"), dict) else {}
    assert stored_values(stored) == without_the_key | values


def test_a_stored_configuration_may_have_a_key_that_was_renamed() -> None:
    given_tree = tree()
    for given, expected in (("a", ("a",)), (None, ())):
        given_tree["evaluation"] = {"sample_prompt": given, "sample_tokens": 3}
        assert parse_config(given_tree, stored=True).evaluation.sample_prompts == expected
        with pytest.raises(ConfigError, match=r"sample_prompt: unknown key; did you mean evaluation\.sample_prompts\?"):
            parse_config(given_tree)


def test_a_stored_configuration_without_the_key_had_the_former_default():
    assert parse_config(tree()).training.compute_dtype == "auto"
    assert parse_config(tree(), stored=True).training.compute_dtype == "bf16"
    assert parse_config(tree(f"{KEY}=auto"), stored=True).training.compute_dtype == "auto"


RELATIONS = "phases.1.distillation={teacher: there, relation_weight: 1.0}"


@pytest.mark.parametrize(
    ("device", "overrides", "said"),
    [
        (ANY_GPU, (), "true, which pays on a GPU"),
        (Device("cpu", "this processor", True, True, 1e15), (), "true, which pays in a run of this length"),
        (Device("cpu", "this processor", True, True, 1e13), (), "false, because the run is too short"),
        (cpu(True), (), "false, because the run is too short"),
        (replace(ANY_GPU, can_compile=False), (), "false, because there is no C++ compiler"),
        (Device("cpu", "this processor", True, False, 1e15), (), "false, because there is no C++ compiler"),
        (ANY_GPU, ("engine={name: deepspeed, zero_stage: 3}",), "false, because the hooks of engine.zero_stage 3"),
        (ANY_GPU, ("engine={name: deepspeed, zero_stage: 2}",), "true, which pays"),
        (ANY_GPU, (RELATIONS,), "false, because a teacher looks inside of blocks"),
    ],
)
def test_a_run_is_compiled_where_that_pays(device, overrides, said):
    config, sayings = made_concrete(parse_config(tree(*overrides)), device)
    assert sayings["training.compile"].startswith(said)
    assert config.training.compile is said.startswith("true")
    parse_config(to_tree(config))  # what was chosen breaks no rule
