"""The configurations that are shipped, their schema and the page about them."""

import json
import os
import re

import pytest
from minimal import tree
from places import ROOT

from launcher.config.file import flat_lines, load_config, parse_config, parse_yaml, to_tree
from launcher.config.reference import reference_page
from launcher.config.schema import json_schema
from launcher.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


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


def test_the_reference_page_is_golden():
    check_golden(ROOT / "docs" / "configuration-reference.md", reference_page())


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
    assert [phase.fraction for phase in config.phases] == [0.6, "rest"]


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
