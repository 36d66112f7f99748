"""The list of all configuration keys, compared with the dataclasses themselves."""

import json
import typing
from dataclasses import MISSING, fields, is_dataclass

from launcher.config.file import parse_yaml
from launcher.config.reference import REQUIRED, configuration_keys
from launcher.config.sections import Config


def dataclass_keys(owner, prefix=""):
    """Path and field of every key, by walking the dataclasses' types."""
    hints = typing.get_type_hints(owner)
    for field in fields(owner):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        yield path, field
        options = (kind, *typing.get_args(kind))
        options += tuple(each for option in typing.get_args(kind) for each in typing.get_args(option))
        inside = next((each for each in options if is_dataclass(each)), None)
        if inside is not None:
            in_list = any(typing.get_origin(each) is tuple for each in options)
            yield from dataclass_keys(inside, f"{path}.{'N.' if in_list else ''}")


def test_every_field_of_every_dataclass_is_a_key_in_its_order():
    assert [key.path for key in configuration_keys()] == [path for path, _ in dataclass_keys(Config)]


def test_defaults_are_those_of_the_dataclasses():
    found = {key.path: key for key in configuration_keys()}
    for path, field in dataclass_keys(Config):
        shown = found[path].default
        if field.default is MISSING:
            assert (shown == REQUIRED) == (field.default_factory is MISSING), path
        elif isinstance(field.default, str):
            assert shown == field.default, path
        else:
            assert parse_yaml(shown, path) == json.loads(json.dumps(field.default)), path


def test_types_are_in_words():
    types = {key.path: key.type for key in configuration_keys()}
    assert types["training.total_tokens"] == "integer or null"
    assert types["phases"] == "list of sections"
    assert types["phases.N.transition.optimizer"] == "`keep`, `reset`, `keep-variance` or `rescale`"
    assert types["optimizer.betas"] == "list of 2 numbers"
    assert types["engine.zero_stage"] == "`0`, `1`, `2`, `3` or null"
    assert types["engine.deepspeed"] == "mapping or null"


def test_every_key_has_a_meaning_of_one_line():
    for key in configuration_keys():
        assert key.docstring, key.path
        assert "\n" not in key.docstring, key.path
