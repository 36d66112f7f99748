"""Names of tasks: Tritrain's own, and all of lm-evaluation-harness, found without importing it.

lm-evaluation-harness defines 14,000 tasks, groups and tags in as many YAML files, which it parses whenever it is asked
for one, for ten seconds and more. Only a few keys at the left margin say what a file defines. They are found by a
regular expression, for all files in about a second, and lm-evaluation-harness makes its own index of them.
"""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from eval.tasks import DEFINITIONS, GROUP, HARNESS

THEIRS = "harness:"
"""In front of a name: lm-evaluation-harness's task, although Tritrain has one of this name."""

KEY = re.compile(
    rb"^[\"']?(task|group|tag|class|include)[\"']?[ \t]*:([^\n]*(?:\n(?:[ \t-][^\n]*|[ \t]*))*)", re.MULTILINE
)
PLAIN = re.compile(rb"[ \t]*([\w.\-]*[A-Za-z_][\w.\-]*)[ \t]*(?:#[^\n]*)?\s*")


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell names of Tritrain's own tasks from those of lm-evaluation-harness, in the order given, each once.

    A name of both is Tritrain's; `harness:NAME` is the other. The name of a YAML file defines a task of one's own.

    Raises:
        ValueError: a name is unknown; says which are similar.
    """
    own = {name + style for style in ("", HARNESS) for name in (GROUP, *DEFINITIONS)}
    ours: dict[str, None] = {}
    theirs: dict[str, None] = {}
    for name in names:
        if name in own:
            ours[name] = None
            continue
        bare = name.removeprefix(THEIRS)
        is_file = bare.endswith((".yaml", ".yml")) and Path(bare).is_file()
        if not is_file and bare not in known_names():
            near = get_close_matches(name, own, n=1) + get_close_matches(name, known_names() - own, n=2)
            advice = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"task {name!r} is not known; {advice}choose {GROUP}, {GROUP}{HARNESS}, single tasks of these (piqa, "
                f"piqa{HARNESS}), or any task, group or tag of lm-evaluation-harness (`lm-eval ls tasks` lists them)"
            )
        theirs[bare] = None
    return list(ours), list(theirs)


@cache
def known_names() -> frozenset[str]:
    """The names of all tasks, groups and tags of lm-evaluation-harness."""
    names: set[str] = set()
    for _, keys in definitions():
        for key in ("task", "group", "tag"):
            value = keys.get(key)
            names.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))
    return frozenset(names)


@cache
def definitions() -> tuple[tuple[Path, dict[str, Any]], ...]:
    """The YAML files that define tasks, in the order of their names, each with the keys that say what it defines."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return ()
    folder = Path(spec.submodule_search_locations[0], "tasks")
    files = sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix())
    return tuple((path, keys) for path in files if (keys := _keys_of(path)).keys() & {"task", "group"})


@cache
def _keys_of(path: Path) -> dict[str, Any]:
    """The keys of a file and of those that it includes; a `task` that lists the members of a group is left out."""
    try:
        own = dict(_parsed(path.read_bytes()))
    except (OSError, yaml.YAMLError):  # lm-evaluation-harness leaves such a file out as well
        return {}
    includes = own.pop("include", [])
    keys: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        keys |= _keys_of((path.parent / include).resolve())
    keys |= own
    if "class" in keys:
        keys.pop("group", None)
    elif "group" in keys:
        keys.pop("task", None)
    return keys


def _parsed(content: bytes) -> Iterator[tuple[str, Any]]:
    """The keys of a file's own."""
    for key, value in KEY.findall(content):
        name = key.decode()
        if name == "class":
            yield name, value.decode()
        elif plain := PLAIN.fullmatch(value):
            yield name, plain[1].decode()
        elif name != "task" or b"\n" not in value.strip():
            yield name, yaml.load(value, Loader=yaml.CSafeLoader)
