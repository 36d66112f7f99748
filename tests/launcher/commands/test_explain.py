"""`tritrain explain`."""

import pytest
from places import ROOT

from launcher.commands.explain import explain
from launcher.config.optimizer import ScheduleConfig
from launcher.errors import ConfigError
from launcher.process.console import Console

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def said(capsys, name, file=None, overrides=()):
    explain(name, file, list(overrides), Console(silent=False))
    return capsys.readouterr().out


def refusal(name):
    with pytest.raises(ConfigError) as caught:
        explain(name, None, [], Console(silent=True))
    return str(caught.value)


def test_a_key_has_its_type_default_and_docstring(capsys):
    shown = said(capsys, "schedule.warmup_steps").splitlines()
    assert shown[0] == f"schedule.warmup_steps: integer, default: {ScheduleConfig().warmup_steps}"
    assert shown[1].endswith(".")
    assert said(capsys, "optimizer.learning_rate").startswith("optimizer.learning_rate: number, required\n")


def test_a_section_lists_its_keys(capsys):
    shown = said(capsys, "phases.N.transition.rollback")
    assert shown.startswith("phases.N.transition.rollback: section or null, default: null\n")
    for key in ("after_tokens", "ramp_factor", "max_attempts"):
        assert f"  phases.N.transition.rollback.{key} " in shown
    assert "  phases.N.precision " in said(capsys, "phases")


def test_the_value_in_a_configuration(capsys):
    shown = said(capsys, "schedule.warmup_steps", QUICKSTART, ["schedule.warmup_steps=7"])
    assert shown.endswith(f"In {QUICKSTART}:\n  schedule.warmup_steps: 7\n")
    phases = said(capsys, "phases.1.transition.ramp.shape", QUICKSTART)
    assert phases.endswith('  phases.0.transition: null\n  phases.1.transition.ramp.shape: "linear"\n')


@pytest.mark.parametrize("name", ["phases.0.steps", "phases.N.steps", "phases.steps"])
def test_an_index_may_be_any_or_none(capsys, name):
    assert said(capsys, name).startswith("phases.N.steps: ")


def test_the_end_of_a_path_is_enough_where_it_is_unique(capsys):
    assert said(capsys, "rewarm_tokens").startswith("phases.N.transition.rewarm_tokens: ")
    assert said(capsys, "warmup_steps").startswith("schedule.warmup_steps: ")  # the run's before a phase's
    message = refusal("interval_steps")
    assert message.startswith("interval_steps: is the end of several keys; choose checkpoint.interval_steps, ")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("schedule.warmup_step", "schedule.warmup_steps"),
        ("learning_rte", "optimizer.learning_rate"),
        ("warmup", "schedule.warmup_steps"),
        ("phases.1.transition.ram", "phases.N.transition.ramp"),
        ("training.learning_rate", "optimizer.learning_rate"),
    ],
)
def test_a_misspelt_key_names_near_ones(name, near):
    message = refusal(name)
    assert message.startswith(f"{name}: unknown key; did you mean ")
    assert near in message


def test_what_is_near_to_nothing_names_the_sections():
    assert refusal("zzz") == (
        "zzz: unknown key; the sections are run, model, data, training, optimizer, schedule, averaging, phases, "
        "engine, checkpoint, logging, evaluation, watch"
    )


def test_overrides_need_a_configuration():
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=3: overrides a configuration; pass --config FILE"):
        explain("schedule.warmup_steps", None, ["schedule.warmup_steps=3"], Console(silent=True))
