"""Every key of the configuration with its type, default and docstring: what the reference page and `explain` show.

The JSON schema is the source. pydantic fills it from the configuration dataclasses and their docstrings, so a key is
documented in one place, below its field.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.schema import json_schema

PAGE_HEAD = """\
# Configuration reference

Every key of the configuration, generated from the docstrings of its dataclasses; `make golden` refreshes this page.
[Configuring](configuring.md) explains how the sections work together. `tritrain explain KEY` prints one entry, and
`tritrain explain KEY --config FILE` the value in your configuration too.

`N` is the index of an element in a list, from 0, as in the override `phases.1.steps=500`. A key without a default must
be given wherever its section is.
"""

REQUIRED = "required"
"""What a key without a default has in its place."""

TYPES = {"integer": "integer", "number": "number", "string": "string", "boolean": "`true` or `false`", "null": "null"}


@dataclass(frozen=True)
class Key:
    """A key or a section of the configuration."""

    path: str
    """Dotted, with `N` for the index in a list: `phases.N.steps`."""
    type: str
    """In words."""
    default: str
    """As YAML, or in words."""
    docstring: str
    """One paragraph, in a single line."""
    is_section: bool

    @property
    def parent(self) -> str:
        """Path of the section that holds the key."""
        return self.path.rpartition(".")[0]


def configuration_keys() -> list[Key]:
    """All sections and keys, in the order of their definition; a section comes before its keys."""
    schema = json_schema()
    return list(_keys_under(schema, schema, ""))


def _keys_under(schema: dict[str, Any], part: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, node in part["properties"].items():
        section, is_list = _section_of(schema, node)
        path = f"{prefix}{name}"
        default = node.get("default")
        default = default if isinstance(default, str) else json.dumps(default)
        about = node.get("description", "")
        if section is not None:
            own = section["description"]
            about = f"{about} {own}".strip() if about != own else own
        if section is not None and "default" not in node:
            default = "the defaults of its keys"
        if name in part["required"]:
            default = REQUIRED
        yield Key(path, _type_of(node), default, " ".join(about.split()), section is not None)
        if section is not None:
            yield from _keys_under(schema, {"required": (), **section}, f"{path}.{'N.' if is_list else ''}")


def _section_of(schema: dict[str, Any], node: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The dataclass that a key holds, or a list of which it holds; None for a plain value."""
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rsplit("/", 1)[1]], False
        if "$ref" in option.get("items", {}):
            return schema["$defs"][option["items"]["$ref"].rsplit("/", 1)[1]], True
    return None, False


def _type_of(node: dict[str, Any]) -> str:
    """The type of a node of the schema, in words."""
    *others, last = _types_of(node)
    return f"{', '.join(others)} or {last}" if others else last


def _types_of(node: dict[str, Any]) -> list[str]:
    """What a node may be, one by one."""
    if "anyOf" in node:
        return [each for option in node["anyOf"] for each in _types_of(option)]
    if "$ref" in node:
        return ["section"]
    if choices := node.get("enum", [node["const"]] if "const" in node else []):
        return [f"`{choice}`" for choice in choices]
    if node["type"] == "array":
        parts = node.get("prefixItems")
        return [f"list of {len(parts)} {_type_of(parts[0])}s" if parts else f"list of {_type_of(node['items'])}s"]
    return [TYPES.get(node["type"], "mapping")]


def reference_page() -> str:
    """The text of `docs/configuration-reference.md`."""
    found = configuration_keys()
    lines = [PAGE_HEAD]
    for section in (key for key in found if key.is_section):
        prefix = f"{section.path}.N" if section.type.startswith("list") else section.path
        lines += [f"{'##' if '.' not in section.path else '###'} `{section.path}`", "", section.docstring, ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key in (key for key in found if key.parent == prefix):
            # GitHub's anchor of a heading is its text without dots, in lower case.
            about = f"See [`{key.path}`](#{key.path.replace('.', '').lower()})." if key.is_section else key.docstring
            default = key.default if key.is_section or key.default == REQUIRED else f"`{key.default}`"
            cells = [f"`{key.path}`", key.type, default, about]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)
