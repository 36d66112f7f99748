"""Read one part of a configuration strictly, and say everything that is wrong with it at once.

pydantic reads the dataclasses and reports each value that does not fit. What it says becomes a sentence for each key:
what was given, and what would be right.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.config.advice import explain, owner_at
from launcher.config.engine import EngineConfig
from launcher.config.optimizer import ScheduleConfig
from launcher.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    OutlierConfig,
    PhaseConfig,
    TrainingConfig,
    WatchConfig,
)
from launcher.config.transition import TransitionConfig
from model.config import DistillationConfig, ModelConfig, RopeScalingConfig
from quant.config import QuantConfig
from quant.ramp import RampConfig

_adapter = functools.cache(TypeAdapter)  # building one takes longer than reading with it


JUDGED_BY: dict[type, dict[str, tuple[str, ...]]] = {
    ModelConfig: {"num_heads": ("head_dim",), "rope_theta": ("rope_scaling",)},
    RopeScalingConfig: {"high_freq_factor": ("low_freq_factor",), "beta_fast": ("beta_slow",)},
    TrainingConfig: {"global_batch_sequences": ("global_batch_tokens",)},
    OutlierConfig: {"window_steps": ("sigmas",)},
    ScheduleConfig: {"drop_at": ("shape",), "drop_factor": ("shape",)},
    PhaseConfig: {"steps": ("tokens", "fraction")},
    QuantConfig: {
        "weights": ("levels", "preset"),
        "granularity": ("preset",),
        "hadamard": ("preset",),
    },
    TransitionConfig: {"rescale_factor": ("optimizer",)},
    RampConfig: {"sharpness": ("shape",), "stairs": ("shape",), "order": ("steps",), "rounding": ("steps",)},
    DistillationConfig: {"relation_layer": ("relation_weight",)},
    EngineConfig: {
        "zero_stage": ("name",),
        "deepspeed": ("name",),
        "offload": ("name", "zero_stage"),
    },
    CheckpointConfig: dict.fromkeys(("start_phase", "sub_norm_sequences", "grow_vocabulary"), ("start_from",)),
    EvaluationConfig: {"tasks_interval_steps": ("tasks",)},
    WatchConfig: {"lost_seconds": ("beat_seconds",)},
}
"""Keys with a value that is right or wrong depending on that of others, where those others have defaults."""


def parse_part(kind: Any, tree: Any, path: str) -> tuple[Any, dict[str, str]]:
    """Read one part; returns it and what is wrong with it, by path. If anything is, the part is of no use.

    A part checks itself as a whole only once every key of it is well-formed. So what is not is left out and the part
    read again, until nothing new is found. A problem does not count if it depends on a key that was left out, for
    that key's default may have caused it, or its absence from a mapping.
    """
    tree = json.loads(json.dumps(tree, default=str))  # a copy, in JSON's types
    adapter = _adapter(kind)
    problems: dict[str, str] = {}
    left_out: set[str] = set()
    while True:
        try:
            return adapter.validate_json(json.dumps(tree)), problems
        except ValidationError as error:
            removed: list[str] = []
            is_mended = False
            for location, detail in _by_location(error, kind, tree).items():
                where = ".".join((path, *location))
                if detail["type"] == "int_type" and _make_whole(tree, location):
                    is_mended = True
                    continue
                for problem, reason, needed in _reasons(detail, kind, location, path):
                    is_whole = not any(key.startswith(f"{problem}.") for key in left_out)
                    if is_whole and left_out.isdisjoint((problem, *needed)):
                        problems.setdefault(problem, reason)
                if not detail["type"].startswith("missing") and _remove(tree, location):
                    removed.append(where)
            if not removed and not is_mended:
                return None, problems
            left_out.update(removed)


def _by_location(error: ValidationError, kind: Any, tree: Any) -> dict[tuple[str, ...], Any]:
    """Each of pydantic's errors by its keys in the tree; those of a key that takes several kinds of values are one."""
    found: dict[tuple[str, ...], Any] = {}
    for detail in error.errors():
        location, is_alternative = tuple(str(key) for key in detail["loc"]), False
        if not _is_in(tree, location):
            location, is_alternative = _without_kind(location, kind, detail["type"])
        if is_alternative and isinstance(detail["input"], dict):
            continue  # the kind that is meant is the section
        if location in found and detail["type"] == "dataclass_type":
            found[location]["msg"] += " or a mapping of keys"
            continue
        if location in found:
            detail["msg"] = f"{found[location]['msg']} or {detail['msg'].removeprefix('Input should be ')}"
        found[location] = detail
    return found


def _without_kind(location: tuple[str, ...], kind: Any, problem: str) -> tuple[tuple[str, ...], bool]:
    """The keys of a location without the name of the kind that was tried, and whether it was a section's alternative.

    pydantic puts such a name after a key that takes several kinds: of plain values, or a section as well.
    """
    for index in range(1, len(location)):
        if _is_section(kind, location[:index]) and location[index] == owner_at(kind, location[:index]).__name__:
            return (*location[:index], *location[index + 1 :]), False
    if not location or location[-1].isdecimal() or problem == "unexpected_keyword_argument":
        return location, False
    parent = location[:-1]
    has_section = _is_section(kind, parent)
    if has_section and location[-1] in (part.name for part in fields(owner_at(kind, parent))):
        return location, False
    return parent, has_section


def _is_section(kind: Any, location: Sequence[str]) -> bool:
    """Return whether a section, not a value, is at ``location`` under the type ``kind``."""
    try:
        owner_at(kind, location)
    except StopIteration:
        return False
    return True


def _reasons(detail: Any, kind: Any, location: tuple[str, ...], path: str) -> Iterator[tuple[str, str, list[str]]]:
    """The problems in one of pydantic's errors: each its path, what is wrong, and the paths that it depends on too.

    Args:
        detail: the error.
        kind: type of the part that it is in.
        location: its keys below that part.
        path: of the part.
    """
    where = ".".join((path, *location))
    if detail["type"] != "value_error":
        yield where, explain(detail, kind, location, path), []
        return
    judged_by = JUDGED_BY.get(owner_at(kind, location), {})
    for key, reason in detail["ctx"]["error"].args[0].items():
        yield f"{where}.{key}", reason, [f"{where}.{other}" for other in judged_by.get(key, ())]


def _make_whole(tree: Any, location: tuple[str, ...]) -> bool:
    """Make a number such as 1e9 the integer that it is; False if it has a fraction."""
    node = tree
    for key in location[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    last = int(location[-1]) if isinstance(node, list) else location[-1]
    if not (isinstance(node[last], float) and node[last].is_integer() and abs(node[last]) < 2**53):
        return False
    node[last] = int(node[last])
    return True


def _is_in(tree: Any, location: tuple[str, ...]) -> bool:
    """Return whether there is a value at ``location``."""
    try:
        for key in location:
            tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def _remove(tree: Any, location: tuple[str, ...]) -> bool:
    """Remove the value at ``location`` from the tree; False if there is none."""
    for key in location[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else tree[int(key)] if isinstance(tree, list) else None
    if location and isinstance(tree, dict) and location[-1] in tree:
        del tree[location[-1]]
        return True
    return False
