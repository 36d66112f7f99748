"""Keys and values of the configuration: what is accepted, what is refused, and how both are said."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minimal import only_problem, problems, tree

from launcher.config.file import flat_lines, parse_config, parse_yaml, to_tree
from launcher.config.sections import Config, RunConfig
from launcher.errors import ConfigError

# Unknown keys


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rte=1", "unknown key; did you mean learning_rate?"),
        ("data.sources.0.wieght=1", "unknown key; did you mean weight?"),
        ("phases.1.tansition={}", "unknown key; did you mean transition?"),
        ("phases.1.transition.ramp.step=1", "unknown key; did you mean steps?"),
        ("phases.1.quantization.weight=x", "unknown key; did you mean weights?"),
        ("training.learning_rate=1", "unknown key; did you mean optimizer.learning_rate?"),
        ("run.zzz=1", "unknown key; choose one of name, folder, seed, stop_before_end_seconds, allow_changes"),
        ("data.prepare={inputs: [x], tokenizer: y, worker: 1}", "unknown key; did you mean workers?"),
    ],
)
def test_unknown_key(override, said):
    path, text = only_problem(override)
    assert text == said
    assert path == (override.split("=")[0] if "prepare" not in override else "data.prepare.worker")


def test_unknown_section():
    assert problems("optimiser.eps=1") == {"optimiser": "unknown section; did you mean optimizer?"}
    assert problems("learning_rate=1") == {"learning_rate": "unknown section; did you mean optimizer.learning_rate?"}
    assert problems("zzz=1")["zzz"].startswith("unknown section; choose one of run, model, data,")


def test_a_key_that_is_no_word():
    changed = tree() | {5: 1}
    changed["run"] = changed["run"] | {7: 1}
    with pytest.raises(ConfigError, match=r"(?m)^run\.7: unknown key; [^\n]*\n5: unknown section; "):
        parse_config(changed)


def mappings(node, path=()):
    """The path of every mapping in a tree."""
    if isinstance(node, dict):
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from mappings(child, (*path, key))


FULL = to_tree(parse_config(tree("data.prepare={inputs: [x], tokenizer: y}")))
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


@settings(max_examples=60)
@given(path=st.sampled_from(sorted(mappings(FULL), key=str)), key=WORDS)
def test_an_unknown_key_anywhere_is_named_with_its_whole_path(path, key):
    changed = copy.deepcopy(FULL)
    node = changed
    for step in path:
        node = node[step]
    if key in node:
        return
    node[key] = 1
    with pytest.raises(ConfigError) as caught:
        parse_config(changed)
    where = ".".join(map(str, (*path, key)))
    assert str(caught.value).startswith(f"{where}: unknown {'key' if path else 'section'}; ")
    assert len(str(caught.value).splitlines()) == 1


# Values


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layers=1.5e0", "is 1.5; must be a valid integer"),
        ("model.num_layers=1e17", "is 1e+17; must be a valid integer"),
        ("model.num_layers='1'", "is '1'; must be a valid integer"),
        ("model.num_layers=true", "is True; must be a valid integer"),
        ("model.num_layers=null", "is None; must be a valid integer"),
        ("model.tie_embeddings=1", "is 1; must be a valid boolean"),
        ("training.compile=on", "is 'on'; must be 'auto' or a valid boolean"),
        ("training.compile=no", "is 'no'; must be 'auto' or a valid boolean"),
        ("training.compute_dtype=fp16", "is 'fp16'; must be 'auto', 'bf16' or 'fp32'"),
        ("optimizer.learning_rate=fast", "is 'fast'; must be a valid number"),
        ("optimizer.learning_rate=.nan", "is nan; must be a finite number"),
        ("optimizer.eps=.inf", "is inf; must be a finite number"),
        ("optimizer.weight_decay=-.inf", "is -inf; must be a finite number"),
        ("run.name=5", "is 5; must be a valid string"),
        ("run.seed=null", "is None; must be a valid integer"),
        ("phases.1.transition.ramp=linear", "is 'linear'; must be a mapping of keys"),
        ("phases.0=16-bit", "is '16-bit'; must be a mapping of keys"),
        ("phases=ternary", "is 'ternary'; must be a list; write [ternary]"),
        ("engine=null", "is null; leave it out for its defaults, or write a mapping of keys"),
        ("data.sources=shards", "is 'shards'; must be a list; write [shards]"),
        ("phases.1.steps=six", "is 'six'; must be a valid integer"),
        ("training.global_batch_sequences=4.5", "is 4.5; must be a valid integer"),
        ("engine.zero_stage=4", "is 4; must be 0, 1, 2 or 3"),
        ("engine.zero_stage=true", "is True; must be 0, 1, 2 or 3"),
        ("engine.timeout_seconds=10000000000000000", "is 10000000000000000; must be 1 or more, and at most 1e9"),
        ('run.folder="a\\0b"', "has a null character, which no path can have"),
        ("schedule.warmup_steps=0.1", "is 0.1; must be a valid integer"),
    ],
)
def test_wrong_type(override, said):
    path, text = only_problem(override)
    assert path == override.split("=")[0]
    assert text.startswith(said)


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9, 0.95, 0.99]", "0.9", "[a, 0.95]", "[0.9, .nan]"])
def test_betas_are_two_numbers(betas):
    path, text = only_problem(f"optimizer.betas={betas}")
    assert path.startswith("optimizer.betas")
    assert "must be Tuple" not in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e9", 1e9), ("1E+3", 1e3), (".5", 0.5), ("1.", 1.0), ("-2.5e1", -25.0), ("1_000.5", 1000.5),
        ("010", 10), ("08", 8), ("+3", 3), ("-1", -1), ("1_000_000", 1_000_000), ("0x10", "0x10"), ("1:30", "1:30"),
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("y", "y"), ("true", True), ("False", False), ("null", None),
        ("~", None), ("", None), ("'3'", "3"), (".", "."), ("..", ".."), ("+", "+"), ("_1", "_1"), ("1e", "1e"),
        ("16-bit", "16-bit"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("<<", "<<"), ("=", "="),
        (".e5", ".e5"), ("٣", "٣"), ("1٣", "1٣"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse_yaml(f"key: {text}", "here")["key"]
    assert read == value
    assert type(read) is type(value)


@settings(max_examples=100)
@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_numbers_survive_json(value):
    assert parse_yaml(json.dumps(value).replace("Infinity", ".inf"), "here") == value


@settings(max_examples=100)
@given(st.text("0123456789+-._eE~yYnN", max_size=6))
def test_a_plain_scalar_is_read_or_refused_but_never_crashes(text):
    message = ""
    try:
        parse_yaml(f"key: {text}", "here")
    except ConfigError as error:
        message = str(error)
    assert not message or message.startswith("here: not valid YAML: ")


def test_an_integer_is_a_float_where_one_is_asked_for():
    rate = parse_config(tree("optimizer.learning_rate=1")).optimizer.learning_rate
    assert rate == 1.0
    assert type(rate) is float
    assert parse_config(tree("optimizer.learning_rate=3e-4")).optimizer.learning_rate == 3e-4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.sampled_from(["", "x", "ternary", "1", "(("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)
LEAVES = [line.split(": ", 1)[0] for line in flat_lines(FULL)]
NODES = sorted({leaf.rsplit(".", depth)[0] for leaf in LEAVES for depth in range(4)})


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(NODES), value=JSON)
def test_any_value_anywhere_is_accepted_or_explained(path, value):
    changed = copy.deepcopy(FULL)
    *parents, last = path.split(".")
    node = changed
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    try:
        parse_config(changed)
    except ConfigError as error:
        for line in str(error).splitlines():
            where, _, what = line.partition(": ")
            assert what
            assert where.split(".")[0] in {part.name for part in fields(Config)}, line


def test_only_strings_that_name_a_folder_are_names():
    for name in ("a", "olmo-1b", "x.1", "_x", "1"):
        RunConfig(name=name)
    for name in ("", ".", "..", ".git", "-x", "a/b", "a b", "a\n"):
        with pytest.raises(ValueError, match="may hold") as caught:
            RunConfig(name=name)
        assert set(caught.value.args[0]) == {"name"}
    assert RunConfig(name="a").path == Path("runs/a")
    assert RunConfig(name="a", folder="/b").path == Path("/b")
