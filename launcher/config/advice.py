"""Say what would be right in place of a wrong key or value: a key that may be meant, or a value to write."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from launcher.config.aliases import ALIASES, ALIASES_IN_SECTION, SECTION_ALIASES
from launcher.config.sections import Config


def explain(detail: Any, kind: Any, location: tuple[str, ...], path: str) -> str:
    """What is wrong with a value, and what would be right.

    Args:
        detail: one of pydantic's errors.
        kind: type of the part that it is in.
        location: its keys below that part.
        path: of the part.
    """
    match detail["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key{suggestion(location[-1], (path, *location[:-1]), owner_at(kind, location[:-1]))}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return "is missing"
        case "dataclass_type":
            return f"is {_as_yaml(detail['input'])}; {_section_advice(detail['input'], owner_at(kind, location))}"
        case "tuple_type":
            value = detail["input"]
            write = f"; write [{value}]" if isinstance(value, str | int | float) else ""
            return f"is {_as_yaml(value)}; must be a list{write}"
        case "too_long":
            return f"is {detail['input']!r}; must be a list of {detail['ctx']['max_length']}"
        case "dict_type":
            return f"is {_as_yaml(detail['input'])}; must be a mapping of keys"
        case _:
            return f"is {detail['input']!r}; {detail['msg'].replace('Input should be', 'must be')}"


def _as_yaml(value: Any) -> str:
    return "null" if value is None else repr(value)


def _section_advice(value: Any, section: Any) -> str:
    """What to write where a section is given as one value: a shape, a preset, a path or nothing."""
    required = [part for part in fields(section) if part.default is dataclasses.MISSING]
    if value is None:
        return "must be a mapping of keys" if required else "leave it out for its defaults, or write a mapping of keys"
    if not isinstance(value, str):
        return "must be a mapping of keys"
    kinds = typing.get_type_hints(section)
    for name, kind in kinds.items():
        options = [choice for option in (kind, *typing.get_args(kind)) for choice in typing.get_args(option)]
        for choice in options:
            if isinstance(choice, str) and choice.startswith(value.lower()):
                return f"must be a mapping of keys; write {{{name}: {choice}}}"
    if required and kinds[required[0].name] is str:
        return f"must be a mapping of keys; write {{{required[0].name}: {value}}}"
    return "must be a mapping of keys"


def owner_at(kind: Any, location: Sequence[str]) -> Any:
    """The dataclass at ``location`` under the type ``kind``."""
    for key in location:
        if key.isdecimal():
            kind = typing.get_args(next(each for each in _options(kind) if typing.get_origin(each) is tuple))[0]
        else:
            kind = typing.get_type_hints(_dataclass_of(kind))[key]
    return _dataclass_of(kind)


def key_named(name: str) -> str | None:
    """The key that a name without its section means, in Tritrain or in other programs; None if none is known."""
    if (key := ALIASES.get(name.lower()) or name) and known_part(key) == key and "." in key:
        return key
    for section, kind in typing.get_type_hints(Config).items():
        if is_dataclass(kind) and name in (part.name for part in fields(kind)):
            return f"{section}.{name}"
    return None


def known_part(key: str) -> str:
    """The longest beginning of a dotted key that a configuration has; empty if it has none."""
    return ".".join(_known(key)[0])


def no_such_key(key: str) -> str | None:
    """Say that a configuration has no such key or section, and which may be meant; None if it has it."""
    (place, kind), names = _known(key), key.split(".")
    if place == names:
        return None
    owner = next((option for option in _options(kind) if is_dataclass(option)), None)
    meant = suggestion(names[len(place)], place, owner) if owner else ""
    return f"{key!r} is no key or section of the configuration{meant}"


def _known(key: str) -> tuple[list[str], Any]:
    """The keys at the beginning of a dotted one that a configuration has, and the type of what they lead to."""
    kind: Any = Config
    known: list[str] = []
    for name in key.split("."):
        if (below := _below(kind, name)) is None:
            break
        kind = below
        known.append(name)
    return known, kind


def _below(kind: Any, name: str) -> Any:
    """The type of what is under a key or an index in a value of a type; None if nothing can be."""
    for option in _options(kind):
        if is_dataclass(option) and name in (part.name for part in fields(option)):
            return typing.get_type_hints(option)[name]
        if typing.get_origin(option) is tuple and name.isdecimal():
            return typing.get_args(option)[0]
        if typing.get_origin(option) is dict or option is Any:  # another program's keys
            return Any
    return None


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _dataclass_of(kind: Any) -> Any:
    return next(option for option in (kind, *typing.get_args(kind)) if is_dataclass(option))


def suggestion(key: str, place: Sequence[str], owner: Any, *, is_section: bool = False) -> str:
    """What may have been meant by an unknown key.

    Args:
        key: the key.
        place: the keys that lead to it.
        owner: the dataclass that does not have it.
        is_section: whether it was given as a mapping.
    """
    names = [part.name for part in fields(owner)]
    if is_section and (section := SECTION_ALIASES.get(key.lower())):
        return f"; did you mean {section}?"
    section = ".".join("N" if part.isdecimal() else part for part in place)
    meant = ALIASES_IN_SECTION.get((section, key.lower())) or ALIASES.get(key.lower())
    if meant is not None:
        return f"; did you mean {meant.replace('N', place[1]) if len(place) > 1 else meant}?"
    for other, kind in typing.get_type_hints(Config).items():
        if key != "name" and is_dataclass(kind) and key in (part.name for part in fields(kind)):
            return f"; did you mean {other}.{key}?"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(names)}"
