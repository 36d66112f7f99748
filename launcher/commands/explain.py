"""`tritrain explain KEY`: what a key of the configuration means, and its value in a configuration."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.messages import safe_message
from launcher.config.aliases import ALIASES
from launcher.config.file import flat_lines, load_config, to_tree
from launcher.config.reference import REQUIRED, Key, configuration_keys
from launcher.errors import ConfigError
from launcher.process.console import Console


def explain(name: str, file: Path | None, overrides: list[str], console: Console) -> None:
    """Print the type, default and docstring of a key, or the keys of a section.

    Args:
        name: a dotted path, with any index or none in a list; or its end, where only one key ends like that.
        file: a configuration, to print the key's value in it.
        overrides: of its keys; only with a configuration.
        console: to print to.

    Raises:
        ConfigError: there is no such key; names near ones. Or the configuration is wrong.
    """
    if overrides and file is None:
        raise ConfigError(f"{overrides[0]}: overrides a configuration; pass --config FILE as well")
    keys = configuration_keys()
    key = find_key(name, keys)
    console.line(f"{key.path}: {key.type}, {'' if key.default == REQUIRED else 'default: '}{key.default}")
    console.line(key.docstring)
    if key.is_section:
        inside = [each for each in keys if without_indexes(each.parent) == without_indexes(key.path)]
        console.line()
        console.aligned([[f"  {each.path}", each.type, each.default] for each in inside])
    if file is not None:
        console.line()
        console.line(f"In {file}:")
        for line in values_of(key.path, to_tree(load_config(file, overrides, stored=None))):
            console.line(f"  {safe_message(line)}")


def find_key(name: str, keys: list[Key]) -> Key:
    """The key of this name.

    Raises:
        ConfigError: there is none; names near ones.
    """
    wanted = without_indexes(name)
    if exact := [key for key in keys if without_indexes(key.path) == wanted]:
        return exact[0]
    ending = [key for key in keys if without_indexes(key.path).endswith(f".{wanted}")]
    of_run = [key for key in ending if not key.path.startswith("phases.")]  # a phase may change what a run says
    if len(chosen := of_run or ending) == 1:
        return chosen[0]
    if ending:
        raise ConfigError(f"{name}: is the end of several keys; choose {', '.join(key.path for key in ending)}")
    by_path = {without_indexes(key.path): key.path for key in keys}
    near = [ALIASES[last]] if (last := wanted.rpartition(".")[2].lower()) in ALIASES else []
    near += [by_path[path] for path in difflib.get_close_matches(wanted, by_path, n=3, cutoff=0.6)]
    for key in keys:
        name_there = key.path.rpartition(".")[2]
        if last in name_there.split("_") or difflib.SequenceMatcher(None, last, name_there).ratio() > 0.8:
            near.append(key.path)
    if near:
        raise ConfigError(f"{name}: unknown key; did you mean {' or '.join(dict.fromkeys(near))}?")
    raise ConfigError(f"{name}: unknown key; the sections are {', '.join(key.path for key in keys if not key.parent)}")


def without_indexes(path: str) -> str:
    """A path without the indexes of lists, whether they are numbers or `N`."""
    return ".".join(part for part in path.split(".") if part != "N" and not part.isdecimal())


def values_of(path: str, tree: Any, prefix: str = "") -> Iterator[str]:
    """The lines of a resolved configuration that belong to a key; those of every element in a list."""
    head, _, rest = path.partition(".")
    if not path or tree is None:
        yield from flat_lines(tree, prefix)
    elif head == "N":
        for index, element in enumerate(tree):
            yield from values_of(rest, element, f"{prefix}.{index}")
    else:
        yield from values_of(rest, tree[head], f"{prefix}.{head}" if prefix else head)
