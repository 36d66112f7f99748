"""Files of configurations and overrides: how they are read, and written out."""

import shlex
from dataclasses import fields, is_dataclass
from unittest.mock import patch

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from minimal import MINIMAL, only_problem, tree
from places import ROOT

from launcher.config.aliases import ALIASES, ALIASES_IN_SECTION, SECTION_ALIASES
from launcher.config.file import (
    MAX_YAML_DEPTH,
    apply_override,
    dump_yaml,
    flat_lines,
    load_config,
    merge,
    override_of,
    parse_config,
    parse_yaml,
    read_mapping,
    to_tree,
)
from launcher.config.reference import configuration_keys
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


@pytest.mark.parametrize("override", ["checkpoint.start_from=", "run.folder= ", "phases.0.steps=\t"])
def test_override_without_a_value(override):
    path = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"has no value; write {path}=null if none is meant"):
        apply_override(tree(), override)


@pytest.mark.parametrize(
    ("value", "text"),
    [("/data/my text #1", "/data/my text #1"), ("# c", "# c"), ("&x y", "&x y"), ("[a, b] # why", "[a, b] # why")],
)
def test_an_override_is_not_cut_at_a_comment(value, text):
    with pytest.raises(ConfigError, match="YAML takes `&` for an anchor and ` #` for a comment; write ") as caught:
        apply_override(tree(), f"run.folder={value}")
    [advice] = shlex.split(str(caught.value).partition("; write ")[2].removesuffix(" for a text"))
    changed = tree()
    apply_override(changed, advice)
    assert changed["run"]["folder"] == text


@pytest.mark.parametrize(
    "text", ["/data/a#1", "a & b", "#", "08", "1e9", "null", "", "- a", "x: y", "schön", '"a', "~"]
)
def test_an_override_that_is_advised_sets_its_text(text):
    changed = tree()
    apply_override(changed, override_of("run.folder", text))
    assert changed["run"]["folder"] == text


TEXTS = ["0913", "08", "0o7", "1e9", "5e3", "-.5", "12e4567", "1_000", "0x10", "1:30", "on", "no", "~", "null", ".inf",
         "<<", "=", "!x", "&a", "*a", "# c", "a # b", "a\tb", "a\nb", " a ", "", "\x85", "\ufeff"]  # fmt: skip


@given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=8), st.text("0123456789.eE+-_:", max_size=6)))
def test_what_is_written_is_read_as_it_was(text):
    written = {"a": text, text or "b": [text, 1, 1e-5, 1e20, True, None, {"c": text}]}
    assert parse_yaml(dump_yaml(written), "x") == written
    assert yaml.safe_load(dump_yaml(written)) == written  # by the rules of YAML 1.1 too


@pytest.mark.parametrize(
    "text",
    ["!!bool maybe", "!!timestamp foo", "!!float ''", "!!binary aGk=", "!!set {a, b}", "!!timestamp 2001-01-01: 1",
     "{!!binary aGk=: 1}", "!!python/none x", "!!omap [a: 1]", "!!pairs [a: 1]", "!!int x"],
)  # fmt: skip
def test_a_tag_gives_one_error(text):
    with pytest.raises(ConfigError, match=r"^x: not valid YAML: "):
        parse_yaml(text, "x")


@pytest.mark.parametrize(
    "key", ["run.folder", "checkpoint.folder", "checkpoint.start_from", "data.cache", "evaluation.task_data"]
)
def test_blank_texts_are_refused(key):
    for value in ("''", "' '", '"\\t"'):
        changed = tree()
        apply_override(changed, f"{key}={value}")
        with pytest.raises(ConfigError, match=rf"(?m)^{key}: is blank; write null, or leave it out, if none is meant"):
            parse_config(changed)
        parse_config(changed, stored=True)


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


@pytest.mark.parametrize(
    ("tree", "patch", "expected"),
    [  # RFC 7396, appendix A, where both are mappings
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_file_of_values_is_a_json_merge_patch(tree, patch, expected):
    merge(tree, patch)
    assert tree == expected


def test_overrides_and_files_of_them_apply_in_order(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL)
    (tmp_path / "patch.yaml").write_text("optimizer: {learning_rate: 0.5, betas: [0.8, 0.9]}\nevaluation: null\n")
    before, after = "optimizer.learning_rate=0.1", "optimizer.betas=[0.1, 0.2]"
    optimizer = load_config(tmp_path / "x.yaml", [before, str(tmp_path / "patch.yaml"), after]).optimizer
    assert (optimizer.learning_rate, optimizer.betas) == (0.5, (0.1, 0.2))


def test_a_file_of_values_that_is_not_there(tmp_path):
    (tmp_path / "x.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"muon\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "x.yaml", ["muon.yaml"])


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
    (tmp_path / "x.yaml").write_text(MINIMAL + "evaluation: {sample_prompts: [Größe]}\n", encoding="utf-8")
    assert load_config(tmp_path / "x.yaml").evaluation.sample_prompts == ("Größe",)


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


def test_numbers_with_an_exponent_are_taken_as_the_integers_that_they_are():
    overrides = ["phases.0={precision: 16-bit, tokens: 1.6e3}", "phases.1.steps=2e0", "training.skip_outliers={}"]
    config = parse_config(tree(*overrides, "training.skip_outliers.window_steps=1e2", "optimizer.learning_rate=1e-3"))
    assert (config.phases[0].tokens, config.phases[1].steps, config.training.skip_outliers.window_steps) == (
        1600,
        2,
        100,
    )
    assert type(config.phases[0].tokens) is int


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("lr=3e-4", "optimizer.learning_rate"),
        ("optimizer.lr=3e-4", "optimizer.learning_rate"),
        ("training.batch_size=4", "training.global_batch_sequences"),
        ("batch_size=4", "training.global_batch_sequences"),
        ("training.grad_accum=4", "training.global_batch_sequences"),
        ("wandb=true", "logging.trackers"),
        ("model.num_hidden_layers=4", "model.num_layers"),
        ("training.max_steps=4", "training.total_steps"),
        ("schedule.min_lr=0.1", "schedule.final_fraction"),
        ("phases.0.max_steps=4", "phases.0.steps"),
        ("training.warmup_steps=4", "schedule.warmup_steps"),  # not total_steps, which is nearer in letters
        ("training.train_iters=4", "training.total_steps"),
        ("model.max_seq_len=4", "model.max_sequence_length"),
        ("data.max_seq_len=4", "data.sequence_length"),
        ("model.normalization=RMSNorm", "model.norm"),
        ("schedule.lr_decay_iters=4", "schedule.horizon_steps"),
        ("schedule.type=cosine", "schedule.shape"),
        ("logging.every=4", "logging.interval_steps"),
        ("checkpoint.every=4", "checkpoint.interval_steps"),
        ("tokenizer=x.model", "data.prepare.tokenizer"),
        ("phases.1.ramp=linear", "phases.1.transition"),
        ("phases.1.transition.ramp_steps=4", "phases.1.transition.ramp"),
        ("phases.1.transition.ramp.type=linear", "phases.1.transition.ramp.shape"),
        ("phases.1.quantization.name=quest", "phases.1.quantization.preset"),
        ("phases.1.distillation.alpha=1", "phases.1.distillation.weight"),
        ("lr_scheduler.warmup_steps=4", "schedule"),
        ("metrics.log_freq=4", "logging"),
        ("train.max_steps=4", "training"),
        ("zero_optimization.stage=2", "engine.deepspeed"),
        ("run.nam=x", "name"),
    ],
)
def test_a_name_of_another_program_is_answered_with_the_key(override, ours):
    _, said = only_problem(override)
    assert said.endswith(f"; did you mean {ours}?")


def test_every_alias_is_of_a_key_and_no_key_itself():
    paths = {key.path for key in configuration_keys()}
    assert {*ALIASES.values(), *ALIASES_IN_SECTION.values()} <= paths
    assert not [f"{section}.{alias}" for section, alias in ALIASES_IN_SECTION if f"{section}.{alias}" in paths]
    assert {*SECTION_ALIASES.values()} <= {field.name for field in fields(Config)}
    assert not {*SECTION_ALIASES} & {field.name for field in fields(Config)}
    for alias, ours in ALIASES.items():
        section = ours.rpartition(".")[0]
        assert f"{section}.{alias}" == ours or f"{section}.{alias}" not in paths, alias
        assert alias == alias.lower()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.1.transition.ramp=linear", "is 'linear'; must be a mapping of keys; write {shape: linear}"),
        ("phases.1.transition.ramp=null", "is null; leave it out for its defaults, or write a mapping of keys"),
        ("phases.1.quantization=bitnet-v2", "is 'bitnet-v2'; must be a mapping of keys; write {preset: bitnet-v2}"),
        ("schedule=cosine", "is 'cosine'; must be a mapping of keys; write {shape: cosine}"),
        ("engine=deepspeed", "is 'deepspeed'; must be a mapping of keys; write {name: deepspeed}"),
        ("phases.1.transition=linear", "is 'linear'; must be a mapping of keys"),
        ("phases.1.quantization=bitnet", "is 'bitnet'; must be a mapping of keys; write {preset: bitnet-b1.58}"),
        ("engine=fsdp", "is 'fsdp'; must be a mapping of keys; write {name: fsdp2}"),
        ("data.sources=[shards]", "is 'shards'; must be a mapping of keys; write {path: shards}"),
        ("model=null", "is null; must be a mapping of keys"),
        ("optimizer.betas=0.9", "is 0.9; must be a list; write [0.9]"),
        ("optimizer.betas=[0.9, 0.95, 0.99]", "is [0.9, 0.95, 0.99]; must be a list of 2"),
        ("run.allow_changes=phases", "is 'phases'; must be a list; write [phases]"),
        ("engine.deepspeed=ds.json", "is 'ds.json'; must be a mapping of keys"),
    ],
)
def test_a_section_given_as_one_value_is_answered_with_what_to_write(override, said):
    path, found = only_problem(override)
    assert path.removeprefix(override.split("=")[0]) in ("", ".0")
    assert found == said


def test_an_override_changes_one_of_the_places_that_an_anchor_names(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text("phases:\n  - {transition: &t {ramp: {steps: 50}}}\n  - {transition: *t}\n")
    tree = read_mapping(path, "sections")
    apply_override(tree, "phases.1.transition.ramp.steps=10")
    apply_override(tree, "model=[&m {a: 1}, *m]")
    apply_override(tree, "model.1.a=2")
    assert [phase["transition"]["ramp"]["steps"] for phase in tree["phases"]] == [50, 10]
    assert tree["model"] == [{"a": 1}, {"a": 2}]


# Two parsers


def outcomes(text):
    """What libyaml's parser and the one in Python make of a text: a tree, or the error's message."""
    found = []
    for fast in (True, False):
        with patch.object(yaml, "__with_libyaml__", fast):
            try:
                found.append(repr(parse_yaml(text, "here")))
            except ConfigError as error:
                found.append(f"error: {error}")
    return found


def is_parsed_in_python(text):
    with patch("launcher.config.file._Loader", side_effect=AssertionError):
        try:
            parse_yaml(text, "here")
        except AssertionError:
            return True
    return False


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_configurations_are_parsed_by_libyaml_with_the_same_result():
    shipped = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    stored = yaml.safe_dump(to_tree(parse_config(parse_yaml(MINIMAL, "minimal"))), sort_keys=False)
    assert len(shipped) > 3
    for text in [*shipped, stored]:
        fast, slow = outcomes(text)
        assert fast == slow
        assert not fast.startswith("error")
        assert not is_parsed_in_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: !", "- ! ", "a:\tb", "a\t", "a: [b\t]", "\ufeffa: 1", "a: 1\n\ufeffb: 2", "[a?b]", "{a: who?}", "a: |#",
        "a: >2#\n  b", "a: 1\na: 2", "run:\n\tname: x", "[1", "a: *b", "&a [*a]", "a: !!python/name:os.getcwd", "\0",
        "a: \ud800", "--- 1\n--- 2", f"a: {2**63}", "[" * 1500,
        "[" * (MAX_YAML_DEPTH + 1) + "]" * (MAX_YAML_DEPTH + 1),
    ],
)  # fmt: skip
def test_texts_that_libyaml_reads_differently_or_refuses_have_one_outcome(text):
    fast, slow = outcomes(text)
    assert fast == slow


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=12),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=6), values, max_size=4),
    max_leaves=8,
)


@settings(max_examples=30)
@given(TREES, st.sampled_from([None, "'", '"', "|", ">"]), st.booleans())
def test_whatever_is_dumped_has_one_outcome(value, style, flow):
    fast, slow = outcomes(yaml.safe_dump(value, default_style=style, default_flow_style=flow, allow_unicode=True))
    assert fast == slow


PIECES = [
    *"[]{},\"'?!|>%@`\\~=#ab1:- \n\t\r\x85\u2028\ufeff", ": ", "- ", " #", "\n  ", "? ", "&a ", "*a", "|-\n  ", "<<: ",
    "key: ", "k:\n  - ", "---\n", "...\n", "%YAML 1.1\n", "!!str ", ".5", "\\x41", "'it''s'",
]  # fmt: skip


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("[null?%'it''s'&a , b]")
def test_whatever_is_written_has_one_outcome(text):
    fast, slow = outcomes(text)
    assert fast == slow
