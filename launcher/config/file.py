"""Read and write configurations: YAML, ``a.b=value`` overrides, and all problems at once.

pydantic reads the dataclasses of `launcher.config.sections` strictly: nothing is coerced and unknown keys are errors.
"""

import contextlib
import dataclasses
import json
import re
import shlex
import typing
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from data.pointers import pointer_problem
from data.urls import url_problem
from launcher.config.advice import no_such_key, suggestion
from launcher.config.automatic import with_former_defaults, with_new_names
from launcher.config.parts import parse_part
from launcher.config.rules import spanning_problems, starting_problems
from launcher.config.sections import Config
from launcher.errors import ConfigError
from quant.config import PRESETS

DERIVED_KEYS = ("tritrain_version", "run_id", "phase_steps")
"""Keys of a run's own `config.yaml` that are not part of the configuration."""


MAX_YAML_CHARS, MAX_YAML_VALUES, MAX_YAML_DEPTH = 500_000, 20_000, 40
"""The largest files that are read: some lines can stand for more values than a machine has memory."""


Part = TypeVar("Part")


class _Rules(Composer, SafeConstructor, Resolver):
    """YAML 1.2's scalars: `3e-4` is a number, `on` and `no` are words; a key given twice is an error.

    A value that an alias stands for counts as often as it is used, as whoever goes through the result meets it.
    A subclass adds a parser.
    """

    check_event: Any
    peek_event: Any

    def __init__(self) -> None:
        Composer.__init__(self)
        self._depth = self._num_values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, mark, before = self.check_event(yaml.AliasEvent), self.peek_event().start_mark, self._num_values
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_YAML_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands for something that contains it", mark)
        self._num_values += self._sizes[id(node)] if is_alias else 1
        self._sizes[id(node)] = self._num_values - before
        if self._num_values > MAX_YAML_VALUES:
            what = f"more than {MAX_YAML_VALUES:,} values, with aliases written out"
            raise yaml.composer.ComposerError(None, None, what, mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
            if isinstance(key, Hashable):  # what is not is refused below
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > 30 or not -(2**63) <= (value := int(text)) < 2**63:  # 010 is ten, not eight
            raise yaml.constructor.ConstructorError(None, None, f"{text:.30} does not fit 64 bits", node.start_mark)
        return value


_Rules.yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", list("-+.0123456789")),
):
    _Rules.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


_Rules.yaml_constructors = {
    tag: constructor
    for tag, constructor in SafeConstructor.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "float", "str", "seq", "map")  # None refuses others
} | {"tag:yaml.org,2002:int": _Rules.construct_integer}


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what our rules, or those of YAML 1.1, would not read as text."""


_Dumper.yaml_implicit_resolvers = {
    first: [*_Rules.yaml_implicit_resolvers.get(first, ()), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ())]
    for first in _Rules.yaml_implicit_resolvers | yaml.SafeDumper.yaml_implicit_resolvers
}


def dump_yaml(tree: dict[str, Any]) -> str:
    """A tree as YAML that `parse_yaml` reads as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(_Rules, yaml.SafeLoader):
    """With the parser in Python, whose errors quote the line."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        _Rules.__init__(self)


if yaml.__with_libyaml__:

    class _FastLoader(_Rules, yaml.CSafeLoader):
        """With libyaml's parser, which takes a fourth of the time."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            _Rules.__init__(self)


READ_DIFFERENTLY = re.compile("[\t!?\ufeff]|[|>][-+0-9]*#")
"""Where libyaml's parser gives another value, or accepts what the other refuses: `a: !`, `[a?b]`, `|#`."""


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; ``origin`` names it in the error. What an alias stands for is a value of its own."""
    if len(text) > MAX_YAML_CHARS:
        raise ConfigError(f"{origin}: has more than {MAX_YAML_CHARS:,} characters and cannot be a configuration")
    of_tags = KeyError, IndexError, AttributeError, TypeError  # where a value is not what its tag says
    problems = (yaml.YAMLError, ValueError, OverflowError, RecursionError, *of_tags)
    if yaml.__with_libyaml__ and not READ_DIFFERENTLY.search(text):
        with contextlib.suppress(*problems):  # what is refused, and why, the parser in Python says
            return _unshared(yaml.load(text, _FastLoader))  # a SafeLoader
    try:
        return _unshared(yaml.load(text, _Loader))  # a SafeLoader
    except problems as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error


def _unshared(tree: Any) -> Any:
    """A copy in which no two places are one object, so that a change of one is none of another."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def load_config(path: Path, overrides: Sequence[str] = (), *, stored: bool | None = False) -> Config:
    """Read a configuration file, apply ``a.b=value`` overrides, and check everything.

    Args:
        path: of the file.
        overrides: of its values.
        stored: as in `parse_config`; None leaves it to the file, which has a version if a run has written it.

    Raises:
        ConfigError: lists every problem, each with the key's path, what is wrong and what would be right.
    """
    tree = read_mapping(path, "sections such as run, model and data")
    stored = "tritrain_version" in tree if stored is None else stored
    for derived in DERIVED_KEYS:
        tree.pop(derived, None)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, stored=stored)


def read_mapping(path: Path, of: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; ``of`` says what, in the error."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARS + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    if problem := pointer_problem(Path(path)):
        raise ConfigError(f"{path}: {problem}")
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of {of}")
    return tree


def load_as(kind: type[Part], path: Path, name: str) -> Part:
    """Read a YAML file that is one dataclass, as strictly as a configuration; ``name`` comes before keys in errors.

    Raises:
        ConfigError: lists every problem.
    """
    tree = read_mapping(path, "keys")
    part, problems = parse_part(kind, tree, name)
    if problems:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _lines(problems, {name: tree})))
    return cast(Part, part)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in a tree of mappings and lists, or all values of a file; values are read as YAML.

    Raises:
        ConfigError: it is neither, the file cannot be read, or the path leads through something that has no such
            element.
    """
    path, separator, value = override.partition("=")
    if is_file(override):
        merge(tree, read_mapping(Path(override), "sections such as schedule and phases"))
        return
    if not separator or not path:
        raise ConfigError(
            f"{override!r}: an override is key.sub=value, such as optimizer.learning_rate=3e-4, or a YAML file of them"
        )
    if not value.strip():  # of a shell's variable that is not set; YAML would read null
        raise ConfigError(f"{override!r}: has no value; write {path}=null if none is meant")
    if value.lstrip().startswith("&") or ("#" in value and _ends_in_comment(value)):
        quoted = shlex.quote(override_of(path, value))
        raise ConfigError(
            f"{override!r}: YAML takes `&` for an anchor and ` #` for a comment; write {quoted} for a text"
        )
    *parents, last = path.split(".")
    if len(parents) >= MAX_YAML_DEPTH:
        raise ConfigError(f"{override:.80}...: has {len(parents) + 1} keys, one inside the other; no key is so deep")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        elif isinstance(node, list) and _is_index(key, node):
            node = node[int(key)]
        else:
            raise ConfigError(f"{override!r}: {'.'.join(parents[: depth + 1])} does not exist")
    parsed = parse_yaml(value, repr(override))
    if isinstance(node, dict):
        node[last] = parsed
    elif isinstance(node, list) and _is_index(last, node):
        node[int(last)] = parsed
    else:
        raise ConfigError(f"{override!r}: {path} does not exist")


def override_of(path: str, text: str) -> str:
    """The override that sets a text, in quotes where YAML would read another value; not yet quoted for a shell."""
    try:
        is_plain = parse_yaml(text, "") == text
    except ConfigError:
        is_plain = False
    return f"{path}={text if is_plain else json.dumps(text, ensure_ascii=False)}"


def _ends_in_comment(value: str) -> bool:
    """Return whether what comes last in a YAML text is a comment: more of it changes no value."""
    try:
        return bool(parse_yaml(value, "") == parse_yaml(f"{value}~", ""))
    except ConfigError:
        return False


def is_file(override: str) -> bool:
    """Return whether an override names a file of values."""
    return "=" not in override and override.endswith((".yaml", ".yml"))


def merge(tree: dict[str, Any], patch: dict[str, Any]) -> None:
    """Set in a tree what a patch holds, as a JSON Merge Patch (RFC 7396): mappings are merged, null removes a key."""
    for key, value in patch.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            merge(tree[key], value)
        else:
            tree[key] = value


def _is_index(key: str, node: list[Any]) -> bool:
    return re.fullmatch("[0-9]{1,9}", key) is not None and int(key) < len(node)


def parse_config(tree: dict[str, Any], *, stored: bool = False) -> Config:
    """Turn nested mappings, as YAML gives them, into a `Config`.

    Args:
        tree: the mappings.
        stored: whether a run or a checkpoint has left them, and only these are to be understood: what a run may start
            with (`RULES_TO_START`, no credentials) is not asked of them, since an earlier version may have asked less,
            and a missing key that may be `auto` has the default that it had before.

    Raises:
        ConfigError: as `load_config`.
    """
    sections = {part.name: part for part in fields(Config)}
    types = typing.get_type_hints(Config)
    problems = {
        str(key): f"unknown section{suggestion(str(key), (), Config, is_section=isinstance(value, dict))}"
        for key, value in tree.items()
        if key not in sections
    }
    parts: dict[str, Any] = {}
    expanded = expand_presets(with_former_defaults(with_new_names(tree)) if stored else tree)
    for name, section in sections.items():
        if name not in tree and section.default_factory is dataclasses.MISSING:
            problems[name] = "the section is missing"
            continue
        part, found = parse_part(types[name], expanded.get(name, {}), name)
        problems |= found
        if not found:
            parts[name] = part
    if not stored:
        starting = starting_problems(parts) | allowance_problems(parts)
        problems = starting | blank_problems(tree) | problems | secret_problems(tree)
    if problems:
        problems |= spanning_problems(parts)
    else:
        try:
            return Config(**parts)
        except ValueError as error:
            problems = error.args[0]
    raise ConfigError("\n".join(_lines(problems, tree)))


def secret_problems(tree: Any) -> dict[str, str]:
    """The values that are URLs with credentials, by path: a run copies its configuration, and logs it."""
    return {path: problem for path, text in _leaves(tree) if (problem := url_problem(text))}


def blank_problems(tree: Any) -> dict[str, str]:
    """The texts without a letter, by path: a blank path would be the current folder, or as good as none."""
    blank = "is blank; write null, or leave it out, if none is meant"
    null = "has a null character, which no path can have"
    return {path: null if text.strip() else blank for path, text in _leaves(tree) if not text.strip() or "\0" in text}


def allowance_problems(parts: dict[str, Any]) -> dict[str, str]:
    """What `run.allow_changes` names and no configuration has; it would allow nothing."""
    named = enumerate(parts["run"].allow_changes if "run" in parts else ())
    return {f"run.allow_changes.{index}": problem for index, key in named if (problem := no_such_key(key))}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each text in nested mappings and lists, after its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, str):
        yield prefix, tree


def _lines(problems: dict[str, str], tree: Any) -> list[str]:
    """A line for each problem, in the order in which the keys are in the file; missing ones are last in their part."""

    def place(path: str) -> list[int]:
        node, places = tree, []
        for key in path.split("."):
            children = node if isinstance(node, dict) else dict(enumerate(node)) if isinstance(node, list) else {}
            keys = [str(child) for child in children]
            places.append(keys.index(key) if key in keys else len(keys))
            node = children[list(children)[places[-1]]] if key in keys else None
        return places

    return [f"{path}: {problems[path]}" for path in sorted(problems, key=place)]


def expand_presets(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys of a preset that a phase's quantization does not set itself."""
    if not isinstance(tree.get("phases"), list):
        return tree
    phases = []
    for phase in tree["phases"]:
        given = phase.get("quantization") if isinstance(phase, dict) else None
        if isinstance(given, dict) and given.get("preset") in tuple(PRESETS):
            phase = phase | {"quantization": dataclasses.asdict(PRESETS[given["preset"]]) | given}
        phases.append(phase)
    return tree | {"phases": phases}


def to_tree(config: Any) -> Any:
    """Turn a configuration back into nested mappings and lists, as YAML writes them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def num_values(tree: Any) -> int:
    """The number of values in nested mappings and lists, as `MAX_YAML_VALUES` counts them: keys and the nests too."""
    if isinstance(tree, dict):
        return 1 + sum(1 + num_values(value) for value in tree.values())
    return 1 + (sum(map(num_values, tree)) if isinstance(tree, list) else 0)


def flat_lines(tree: Any, prefix: str = "") -> Iterator[str]:
    """The resolved form of a configuration: one ``a.b: value`` line for every leaf."""
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from flat_lines(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield f"{prefix}: {json.dumps(tree)}"
