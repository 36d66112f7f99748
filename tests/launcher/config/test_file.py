"""Files of configurations and overrides: how they are read, and written out."""

from dataclasses import fields, is_dataclass

import pytest
from minimal import MINIMAL, tree

from launcher.config.file import apply_override, flat_lines, load_config, parse_config, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError


def value_at(config, path):
    for key in path.split("."):
        config = config[int(key)] if isinstance(config, tuple) else getattr(config, key)
    return config


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("phases.1.steps=9", "phases.1.steps", 9),
        ("phases.1.transition.ramp.steps=3", "phases.1.transition.ramp.steps", 3),
        ("checkpoint.interval_steps=7", "checkpoint.interval_steps", 7),
        ("schedule={shape: constant}", "schedule.shape", "constant"),
        ("run.folder=a=b", "run.folder", "a=b"),
        ("run.folder=.", "run.folder", "."),
        ("phases.1.transition=null", "phases.1.transition", None),
        ("phases.1.transition=", "phases.1.transition", None),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.betas.0=0.8", "optimizer.betas.0", 0.8),
        ("data.sources.0.path=elsewhere", "data.sources.0.path", "elsewhere"),
    ],
)
def test_override(override, path, value):
    with_betas = tree("optimizer.betas=[0.9, 0.95]")
    apply_override(with_betas, override)
    assert value_at(parse_config(with_betas), path) == value


def test_override_makes_a_section_that_is_not_there():
    changed = tree()
    assert "evaluation" not in changed
    apply_override(changed, "evaluation.interval_steps=3")
    changed["checkpoint"] = None  # `checkpoint:` with nothing behind it
    apply_override(changed, "checkpoint.interval_steps=4")
    config = parse_config(changed)
    assert (config.evaluation.interval_steps, config.checkpoint.interval_steps) == (3, 4)


@pytest.mark.parametrize("override", ["", "=", "=1", "optimizer.learning_rate", "--learning-rate"])
def test_override_of_no_form(override):
    with pytest.raises(ConfigError, match=r"an override is key\.sub=value, such as optimizer\.learning_rate=3e-4"):
        apply_override(tree(), override)


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("phases.2.steps=1", "phases.2"),
        ("phases.-1.steps=1", "phases.-1"),
        ("phases.last.steps=1", "phases.last"),
        ("phases.².steps=1", "phases.²"),
        ("phases.5=1", "phases.5"),
        ("run.name.first=1", "run.name.first"),
        ("run.name.first.second=1", "run.name.first"),
    ],
)
def test_override_of_nothing(override, missing):
    with pytest.raises(ConfigError) as caught:
        apply_override(tree(), override)
    assert str(caught.value) == f"{override!r}: {missing} does not exist"


def test_override_that_is_no_yaml():
    with pytest.raises(ConfigError, match=r"^'optimizer\.betas=\[1': not valid YAML: "):
        apply_override(tree(), "optimizer.betas=[1")


def test_overrides_apply_in_order_and_leave_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL)
    assert load_config(path, ["run.seed=1", "run.seed=2"]).run.seed == 2
    assert load_config(path).run.seed == 0


# Files


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path / "x.yaml") == f"{tmp_path / 'x.yaml'}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "bytes.yaml").write_bytes(b"run: \xff\xfe")
    assert refusal(tmp_path / "bytes.yaml").startswith(f"{tmp_path / 'bytes.yaml'}: is not UTF-8 text: ")


@pytest.mark.parametrize("text", ["", "- run\n- model", "just words", "5"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    assert refusal(tmp_path / "x.yaml").endswith("x.yaml: must be a mapping of sections such as run, model and data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [1", "line"),
        ("run:\n\tname: x", "line 2"),
        ("run: {name: a, seed: 1, name: b}", "the key 'name' appears twice"),
        ("run: {name: a}\nrun: {name: b}", "the key 'run' appears twice"),
        ("phases:\n- {steps: 1, steps: 2}", "the key 'steps' appears twice"),
        ("run: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_yaml(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    message = refusal(tmp_path / "x.yaml")
    assert message.startswith(f"{tmp_path / 'x.yaml'}: not valid YAML: ")
    assert said in message
    assert "line" in message


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL + "evaluation: {sample_prompt: Größe}\n", encoding="utf-8")
    assert load_config(tmp_path / "x.yaml").evaluation.sample_prompt == "Größe"


# Writing


def test_flat_lines():
    lines = list(flat_lines({"a": {"b": 1, "c": []}, "d": [{"e": None}, "x"], "f": {}, "g": 1e-5}))
    assert lines == ["a.b: 1", "a.c: []", "d.0.e: null", 'd.1: "x"', "f: {}", "g: 1e-05"]


def test_every_section_has_a_line_for_every_key():
    config = parse_config(tree())
    lines = {line.split(": ")[0] for line in flat_lines(to_tree(config))}
    for section in fields(Config):
        part = getattr(config, section.name)
        for key in fields(part) if is_dataclass(part) else ():
            path = f"{section.name}.{key.name}"
            assert any(line == path or line.startswith(path + ".") for line in lines), path
