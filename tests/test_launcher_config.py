"""The configuration file: what is accepted, what is refused, and how both are said."""

import copy
import json
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config import Config, ConfigError, RunConfig
from launcher.config_file import apply_override, flat_lines, json_schema, load_config, parse_config, parse_yaml, to_tree

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

MINIMAL = """
run: {name: minimal}
model: {vocab_size: 64, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 24}
data: {sources: [{path: shards}], sequence_length: 8}
training: {global_batch_sequences: 4, micro_batch_sequences: 2}
optimizer: {learning_rate: 1e-3}
phases:
  - {precision: 16-bit, steps: 4}
  - {precision: ternary, steps: 6, quantization: {}, transition: {ramp: {}}}
"""


def tree(*overrides):
    result = parse_yaml(MINIMAL, "minimal")
    for override in overrides:
        apply_override(result, override)
    return result


def problems(*overrides):
    """Every problem of the minimal configuration with these overrides, by path."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(*overrides))
    lines = str(caught.value).splitlines()
    result = dict(line.split(": ", 1) for line in lines)
    assert len(result) == len(lines)
    return result


def only_problem(*overrides):
    found = problems(*overrides)
    assert len(found) == 1, found
    return next(iter(found.items()))


def value_at(config, path):
    for key in path.split("."):
        config = config[int(key)] if isinstance(config, tuple) else getattr(config, key)
    return config


# What is shipped


def check_golden(path, text):
    if os.environ.get("TRITRAIN_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is not there: run `make golden`"
    assert path.read_text() == text, f"{path} is out of date: run `make golden` and read the diff"


@every_config
def test_resolved_form_is_golden(path):
    lines = flat_lines(to_tree(load_config(path)))
    check_golden(ROOT / "tests" / "golden" / f"{path.stem}.txt", "\n".join(lines) + "\n")


def test_every_golden_file_belongs_to_a_config():
    goldens = (ROOT / "tests" / "golden").glob("*.txt")
    assert {path.stem for path in goldens} == {path.stem for path in CONFIGS}


def test_schema_is_golden():
    check_golden(ROOT / "configs" / "schema.json", json.dumps(json_schema(), indent=2) + "\n")


@every_config
def test_shipped_config_is_short_and_points_editors_to_the_schema(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert 40 <= len(lines) <= 70
    assert load_config(path).run.name == path.stem


@every_config
def test_round_trip(path):
    config = load_config(path)
    assert parse_config(to_tree(config)) == config


# The page on configuring

PAGE = (ROOT / "docs" / "configuring.md").read_text(encoding="utf-8")


def test_the_page_shows_a_real_error():
    shown = re.search(r"```\n\$ tritrain plan (\S+) (.*?)\n```", PAGE, re.DOTALL)
    command, _, said = shown[2].replace("\\\n", "").partition("\n")
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / shown[1], command.split())
    assert str(caught.value) == said


def test_the_page_shows_real_phases():
    phases = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "phases:" in block)
    shown = parse_yaml(phases, "page")
    config = parse_config(tree() | shown | {"training": tree()["training"] | shown["training"]})
    assert [phase.fraction for phase in config.phases] == [0.6, 0.4]


def test_the_page_lists_every_shipped_config():
    assert set(re.findall(r"\(\.\./configs/(.*?)\.yaml\)", PAGE)) == {path.stem for path in CONFIGS}


# The schema


def resolve(schema, node):
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def schema_errors(schema, node, value, path=""):
    """The part of JSON Schema that a configuration's schema uses; an unknown keyword is an error here."""
    node = resolve(schema, node)
    known = {"$defs", "$schema", "title", "description", "default", "type", "properties", "required", "enum", "const"}
    known |= {"additionalProperties", "anyOf", "items", "prefixItems", "minItems", "maxItems"}
    assert set(node) <= known, set(node) - known
    if "anyOf" in node:
        tried = [list(schema_errors(schema, option, value, path)) for option in node["anyOf"]]
        if all(tried):
            yield f"{path}: none of the options: {tried}"
        return
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        yield f"{path}: {value!r} is not allowed"
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = node.get("type")
    if kind == "null":
        if value is not None:
            yield f"{path}: {value!r} is not null"
    elif kind and (not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "boolean")):
        yield f"{path}: {value!r} is no {kind}"
    elif kind == "object":
        for key in node.get("required", ()):
            if key not in value:
                yield f"{path}.{key}: missing"
        for key, child in value.items():
            if key in node.get("properties", {}):
                yield from schema_errors(schema, node["properties"][key], child, f"{path}.{key}")
            elif node.get("additionalProperties") is not True:
                yield f"{path}.{key}: unknown"
    elif kind == "array":
        for index, child in enumerate(value):
            parts = node.get("prefixItems")
            yield from schema_errors(schema, parts[index] if parts else node["items"], child, f"{path}.{index}")


@every_config
def test_shipped_config_fits_the_schema(path):
    schema = json_schema()
    assert not list(schema_errors(schema, schema, parse_yaml(path.read_text(), path.name)))


def test_schema_refuses_what_the_reader_refuses():
    schema = json_schema()
    for override in ("run.nam=x", "model.num_layers=1.5", "phases.0.precision=8-bit", "phases.1.transition.x=1"):
        assert list(schema_errors(schema, schema, tree(override))), override


def test_schema_describes_every_key():
    schema = json_schema()
    for name, part in [("Config", schema), *schema["$defs"].items()]:
        assert part.get("description"), name
        assert part["additionalProperties"] is False, name
        if name != "Config":
            for key, node in part["properties"].items():
                assert node.get("description"), f"{name}.{key} has no docstring"


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
        ("run.zzz=1", "unknown key; there are name, folder, seed, stop_before_end_seconds"),
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
    assert problems("zzz=1")["zzz"].startswith("unknown section; there are run, model, data,")


def test_a_key_that_is_no_word():
    changed = tree() | {5: 1}
    changed["run"] = changed["run"] | {7: 1}
    with pytest.raises(ConfigError, match=r"(?m)^5: unknown section; [^\n]*\nrun\.7: unknown key"):
        parse_config(changed)


def mappings(node, path=()):
    """The path of every mapping in a tree."""
    if isinstance(node, dict):
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from mappings(child, (*path, key))


FULL = to_tree(parse_config(tree("data.prepare={inputs: [x], tokenizer: y}")))
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
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
        ("model.num_layers=1.0", "is 1.0; must be a valid integer"),
        ("model.num_layers=1e0", "is 1.0; must be a valid integer"),
        ("model.num_layers='1'", "is '1'; must be a valid integer"),
        ("model.num_layers=true", "is True; must be a valid integer"),
        ("model.num_layers=null", "is None; must be a valid integer"),
        ("model.tie_embeddings=1", "is 1; must be a valid boolean"),
        ("training.compile=on", "is 'on'; must be a valid boolean"),
        ("training.compile=no", "is 'no'; must be a valid boolean"),
        ("training.compute_dtype=fp16", "is 'fp16'; must be 'bf16' or 'fp32'"),
        ("optimizer.learning_rate=fast", "is 'fast'; must be a valid number"),
        ("optimizer.learning_rate=.nan", "is nan; must be a finite number"),
        ("optimizer.eps=.inf", "is inf; must be a finite number"),
        ("optimizer.weight_decay=-.inf", "is -inf; must be a finite number"),
        ("run.name=5", "is 5; must be a valid string"),
        ("run.seed=null", "is None; must be a valid integer"),
        ("phases.1.transition.ramp=linear", "is 'linear'; must be a mapping of keys"),
        ("phases.0=16-bit", "is '16-bit'; must be a mapping of keys"),
        ("phases=ternary", "is 'ternary'; must be a valid array"),
        ("engine=null", "is None; must be a mapping of keys"),
        ("data.sources=shards", "is 'shards'; must be a valid array"),
        ("phases.1.steps=six", "is 'six'; must be a valid integer"),
        ("training.global_batch_sequences=4.5", "is 4.5; must be a valid integer"),
        ("engine.zero_stage=4", "is 4; must be 0, 1, 2 or 3"),
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


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_numbers_survive_json(value):
    assert parse_yaml(json.dumps(value).replace("Infinity", ".inf"), "here") == value


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
        (["optimizer.betas=[1, 0.9]"], "optimizer.betas", "is [1.0, 0.9]; both must lie in [0, 1), such as [0.9"),
        (["schedule.warmup_steps=-1"], "schedule.warmup_steps", "is -1; must be 0 or more"),
        (["schedule.final_fraction=1.1"], "schedule.final_fraction", "is 1.1; must lie between 0 and 1"),
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
        (["engine.offload=optimizer"], "engine.offload", "is optimizer; fsdp2 offloads all or none"),
        (["model.num_heads=3"], "model.num_heads", "3 does not divide hidden_size 16"),
        (["run.folder=~/runs/a"], "run.folder", "'~/runs/a' would be a folder named '~'; write '/"),
        (["run.folder=s3://b/a"], "run.folder", "'s3://b/a' is a URL; give a folder of this machine's"),
        (["checkpoint.folder=~/a"], "checkpoint.folder", "'~/a' would be a folder named '~'"),
        (["data.sources.0.path=~/a"], "data.sources.0.path", "'~/a' would be a folder named '~'"),
        (["data.sources=[]"], "data.sources", "is empty; name at least one prepared folder"),
        (["data.sources.0.weight=0"], "data.sources.0.weight", "0.0 is not a positive number"),
        (["data.sequence_length=4096"], "data.sequence_length", "is 4096, beyond model.max_sequence_length 2048"),
        (["training.micro_batch_sequences=3"], "training.micro_batch_sequences", "3 does not divide the global "
         "batch of 4 sequences; 1, 2, 4 do"),
        (["training.global_batch_sequences=null", "training.global_batch_tokens=20"], "training.global_batch_tokens",
         "is 20, no multiple of data.sequence_length 8; 16 or 24 would be"),
        (["training.global_batch_sequences=null", "training.global_batch_tokens=3"], "training.global_batch_tokens",
         "is 3, no multiple of data.sequence_length 8; 8 would be"),
        (["phases.0={precision: 16-bit, fraction: 0.5}"], "phases.0.fraction", "needs training.total_steps or"),
        (["training.total_steps=10"], "training.total_steps", "does nothing, because no phase's length is a fraction"),
        (["training.total_tokens=999"], "training.total_tokens", "does nothing, because no phase's length is a frac"),
        (["phases.0.transition.optimizer=reset"], "phases.0.transition", "the first phase has nothing to keep"),
        (["phases.0.transition.data=restart"], "phases.0.transition", "the first phase has nothing to keep"),
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
        (["engine.offload=all"], "engine.offload", "is all; only zero_stage 3 can"),
        (["engine.zero_stage=0", "engine.offload=optimizer"], "engine.offload", "is optimizer; zero_stage 0 cannot"),
        (["engine.deepspeed={bf16: {enabled: true}}"], "engine.deepspeed.bf16.enabled", "set training.compute_dtype"),
        (["engine.deepspeed={optimizer: {}}"], "engine.deepspeed.optimizer", "set optimizer instead"),
        (["engine.deepspeed={gradient_clipping: 1}"], "engine.deepspeed.gradient_clipping", "optimizer.max_grad_norm"),
        (["engine.deepspeed={zero_optimization: {stage: 3}}"], "engine.deepspeed.zero_optimization.stage",
         "set engine.zero_stage instead"),
        (["engine.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
         "engine.deepspeed.zero_optimization.offload_optimizer.device", "set engine.offload instead"),
        (["engine.deepspeed={train_batch_size: 4}"], "engine.deepspeed.train_batch_size",
         "set training.global_batch_sequences instead"),
    ],
)  # fmt: skip
def test_deepspeed_contradictions_name_our_key(overrides, path, said):
    where, text = only_problem(*DEEPSPEED, *overrides)
    assert where == path
    assert said in text


def test_deepspeed_keys_pass_through():
    extra = "engine.deepspeed={zero_optimization: {overlap_comm: true, reduce_bucket_size: 1000}, steps_per_print: 5}"
    config = parse_config(tree(*DEEPSPEED, extra))
    assert config.engine.deepspeed == {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000},
        "steps_per_print": 5,
    }


@pytest.mark.parametrize(
    ("model", "include", "matches"),
    [
        ("model.tie_embeddings=false", "lm_head", True),
        ("model.tie_embeddings=true", "lm_head", False),
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
    parse_config(tree(*both, "phases.1.fraction=0.1"))
    assert only_problem(*both, "phases.1.fraction=0.4") == (
        "phases",
        "have fractions of 1.1 in sum; 1 is the whole run",
    )


def test_first_phase_may_have_a_ramp_or_a_start():
    first = ["phases.0={precision: ternary, steps: 4, transition: {ramp: {steps: 2}}}"]
    parse_config(tree(*first))
    parse_config(tree("checkpoint.start_from=x", "phases.0.transition.optimizer=reset"))
    assert only_problem(*first, "phases.0.transition.schedule=restart")[0] == "phases.0.transition"


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
        "schedul", "run.nam", "model.z_loss", "data.sequence_lenght", "training.max_skipped_steps",
        "optimizer.learning_rate", "phases.0.steps", "phases.1.precision", "phases.1.quantization.include",
        "checkpoint.keep_last",
    ]  # fmt: skip


def test_a_malformed_key_does_not_hide_what_else_is_wrong_in_its_part():
    found = problems("schedule.warmup_steps=x", "schedule.final_fraction=2", "schedule.typo=1", "schedule.shape=round")
    assert set(found) == {f"schedule.{key}" for key in ("warmup_steps", "final_fraction", "typo", "shape")}
    found = problems("phases.1.transition.rewarm_tokens=-1", "phases.1.tokens=4")
    assert set(found) == {"phases.1.transition.rewarm_tokens", "phases.1.steps"}


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
        ["phases.0.steps=null", "phases.0.tokens=1e9"],
        ["training.global_batch_sequences=1e3"],
        ["engine.name=deepspeed", "engine.zero_stage=5"],
        ["engine.zero_stage=2", "engine.name=deepsped"],
        ["model.hidden_size=18", "model.num_heads=4", "model.head_dim=x"],
        ["training.total_steps=1e4", "phases.0={precision: 16-bit, fraction: 1.0}"],
        ["phases.0.transition.optimizer=reset", "checkpoint.start_from=5"],
        ["data.sequence_length=4096", "model.max_sequence_length='4096'"],
        ["run.name=5"],
        ["phases.1.transition={ramp: 5, optimizer: reset}"],
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
    assert str(caught.value) == f"{override!r}: {missing} is not there"


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
        ("run: {name: a, seed: 1, name: b}", "the key 'name' is there twice"),
        ("run: {name: a}\nrun: {name: b}", "the key 'run' is there twice"),
        ("phases:\n- {steps: 1, steps: 2}", "the key 'steps' is there twice"),
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
