"""Reading and writing configurations: YAML, ``a.b=value`` overrides, and what is wrong, all of it at once.

pydantic reads the dataclasses of `launcher.config.sections` strictly: nothing is coerced and unknown keys are errors.
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from launcher.config.rules import spanning_problems
from launcher.config.sections import Config
from launcher.errors import ConfigError
from quant.config import PRESETS

DERIVED_KEYS = ("tritrain_version", "phase_steps")
"""What a run's own `config.yaml` holds besides the configuration, which it is a configuration without."""


Part = TypeVar("Part")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `on` and `no` are words; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # 010 is ten, not eight


_Loader.yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; ``origin`` names it in the error."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply ``a.b=value`` overrides, and check everything.

    Raises:
        ConfigError: lists every problem, each with the key's path, what is wrong and what would be right.
    """
    tree = read_mapping(path, "sections such as run, model and data")
    for derived in DERIVED_KEYS:
        tree.pop(derived, None)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def read_mapping(path: Path, of: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; ``of`` says what, in the error."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of {of}")
    return tree


def load_as(kind: type[Part], path: Path, name: str) -> Part:
    """Read a YAML file that is one dataclass, as strictly as a configuration; ``name`` stands before keys in errors.

    Raises:
        ConfigError: lists every problem.
    """
    problems: dict[str, str] = {}
    part = _parse_part(kind, read_mapping(path, "keys"), name, problems)
    if problems:
        raise ConfigError("\n".join(f"{path}: {key}: {problem}" for key, problem in problems.items()))
    return cast(Part, part)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in a tree of mappings and lists; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or the path leads through something that has no such element.
    """
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"{override!r}: an override is key.sub=value, such as optimizer.learning_rate=3e-4")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise ConfigError(f"{override!r}: {'.'.join(parents[: depth + 1])} is not there")
    parsed = parse_yaml(value, repr(override))
    if isinstance(node, dict):
        node[last] = parsed
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = parsed
    else:
        raise ConfigError(f"{override!r}: {path} is not there")


def parse_config(tree: dict[str, Any]) -> Config:
    """Turn nested mappings, as YAML gives them, into a `Config`.

    Raises:
        ConfigError: as `load_config`.
    """
    sections = {part.name: part for part in fields(Config)}
    types = typing.get_type_hints(Config)
    problems = {str(key): f"unknown section{_suggestion(str(key), Config)}" for key in tree if key not in sections}
    parts: dict[str, Any] = {}
    tree = expand_presets(tree)
    for name, part in sections.items():
        if name not in tree and part.default_factory is dataclasses.MISSING:
            problems[name] = "the section is missing"
            continue
        parts[name] = _parse_part(types[name], tree.get(name, {}), name, problems)
    problems |= spanning_problems({name: part for name, part in parts.items() if part is not None})
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for path, problem in problems.items()))
    return Config(**parts)


def expand_presets(tree: dict[str, Any]) -> dict[str, Any]:
    """Put the keys of a named recipe in front of those that a phase's quantization gives itself."""
    if not isinstance(tree.get("phases"), list):
        return tree
    phases = []
    for phase in tree["phases"]:
        given = phase.get("quantization") if isinstance(phase, dict) else None
        if isinstance(given, dict) and given.get("preset") in tuple(PRESETS):
            phase = phase | {"quantization": dataclasses.asdict(PRESETS[given["preset"]]) | given}
        phases.append(phase)
    return tree | {"phases": phases}


_adapter = functools.cache(TypeAdapter)  # building one takes longer than reading with it


def _parse_part(kind: Any, tree: Any, path: str, problems: dict[str, str]) -> Any:
    """Read one part, adding what is wrong to ``problems``; None if anything is.

    A part checks itself as a whole only once every key of it is well-formed. So what is not is left out and the part
    read again, until nothing new is found. What is then said about a key that was left out does not count.
    """
    tree = json.loads(json.dumps(tree, default=str))  # a copy, in JSON's types
    adapter = _adapter(kind)
    left_out: list[str] = []
    while True:
        try:
            part = adapter.validate_json(json.dumps(tree))
            return None if left_out else part
        except ValidationError as error:
            found: dict[str, str] = {}
            removed: list[str] = []
            for detail in error.errors():
                location = tuple(str(key) for key in detail["loc"])
                where = ".".join((path, *location))
                if detail["type"] == "value_error":
                    reason = detail["ctx"]["error"].args[0]
                    nested = reason if isinstance(reason, dict) else {"": str(reason)}
                    found |= {f"{where}.{key}".rstrip("."): text for key, text in nested.items()}
                else:
                    found[where] = _explain(detail, kind, location)
                if not detail["type"].startswith("missing") and _remove(tree, location):
                    removed.append(location[-1])
            for where, text in found.items():
                if not any(re.search(rf"\b{re.escape(key)}\b", f"{where}: {text}") for key in left_out):
                    problems[where] = text
            if not removed:
                return None
            left_out += removed


def _remove(tree: Any, location: tuple[str, ...]) -> bool:
    """Take what stands at ``location`` out of the tree; False where nothing stands there."""
    for key in location[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else tree[int(key)] if isinstance(tree, list) else None
    if location and isinstance(tree, dict) and location[-1] in tree:
        del tree[location[-1]]
        return True
    return False


def _explain(detail: Any, kind: Any, location: tuple[str, ...]) -> str:
    match detail["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key{_suggestion(location[-1], _owner(kind, location[:-1]))}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return "is missing"
        case "dataclass_type":
            return f"is {detail['input']!r}; must be a mapping of keys"
        case _:
            return f"is {detail['input']!r}; {detail['msg'].replace('Input should be', 'must be')}"


def _owner(kind: Any, location: Sequence[str]) -> Any:
    """The dataclass that stands at ``location`` under the type ``kind``."""
    for key in location:
        kind = typing.get_args(kind)[0] if key.isdecimal() else typing.get_type_hints(_dataclass_of(kind))[key]
    return _dataclass_of(kind)


def _dataclass_of(kind: Any) -> Any:
    return next(option for option in (kind, *typing.get_args(kind)) if is_dataclass(option))


def _suggestion(key: str, owner: Any) -> str:
    names = [part.name for part in fields(owner)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    for section, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind) and key in (part.name for part in fields(kind)):
            return f"; did you mean {section}.{key}?"
    return f"; there are {', '.join(names)}"


def to_tree(config: Any) -> Any:
    """Turn a configuration back into nested mappings and lists, as YAML writes them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat_lines(tree: Any, prefix: str = "") -> Iterator[str]:
    """The resolved form of a configuration: one ``a.b: value`` line for every leaf."""
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from flat_lines(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield f"{prefix}: {json.dumps(tree)}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Config).json_schema()}
