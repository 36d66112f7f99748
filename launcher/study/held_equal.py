"""What was held equal in a study, and what differs between its arms: every key of their configurations."""

from collections.abc import Iterator, Mapping
from typing import Any

from data.urls import redacted
from launcher.config.file import to_tree
from launcher.process.console import human_count
from launcher.study.reading import Findings
from model.size import num_linear_parameters, num_parameters

ITS_OWN = ("run.name", "run.folder")
"""Keys that every arm has for itself."""

FIRST = (
    *("model.hidden_size", "model.num_layers", "model.sub_norm", "model.vocab_size"),
    *("training.global_batch_sequences", "training.total_steps", "data.sequence_length"),
    *(
        "data.sources.0.path",
        "data.validation_rows",
        "optimizer.name",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    ),
    *("schedule.shape", "schedule.warmup_steps", "schedule.decay_fraction", "training.precision"),
)
"""Keys that a reader asks for first, as far as they are equal."""


def values_by_key(findings: Findings) -> dict[str, dict[str, list[str]]]:
    """By key, each value with the names of the arms that have it; of arms that have begun."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in findings.records:
        if record.arm is not None:
            for key, value in _leaves("", to_tree(record.arm.config)):
                if key not in ITS_OWN:
                    found.setdefault(key, {}).setdefault(value, []).append(record.name)
    num = sum(record.arm is not None for record in findings.records)
    for values in found.values():  # an arm with fewer phases lacks the keys of the others
        if (lacking := num - sum(map(len, values.values()))) > 0:
            values[""] = ["?"] * lacking
    return found


def held_equal(findings: Findings) -> dict[str, str]:
    """The keys that all arms have in common, with their value; those that matter most first."""
    equal = {key: next(iter(values)) for key, values in values_by_key(findings).items() if len(values) == 1}
    first = [key for key in FIRST if key in equal]
    return {key: equal[key] for key in [*first, *(key for key in equal if key not in first)]}


def sizes(findings: Findings) -> dict[str, str]:
    """Size of the models and tokens of the runs; several values where they differ."""
    facts: dict[str, dict[str, None]] = {}
    for record in findings.records:
        if record.arm is not None:
            model, tokens = record.arm.config.model, record.arm.tokens
            ternary = num_linear_parameters(model)
            facts.setdefault("parameters", {})[human_count(num_parameters(model))] = None
            facts.setdefault("of which ternary", {})[human_count(ternary)] = None
            facts.setdefault("tokens", {})[human_count(tokens)] = None
            facts.setdefault("tokens for each ternary parameter", {})[f"{tokens / ternary:.3g}"] = None
    return {fact: ", ".join(values) for fact, values in facts.items()}


def differing(findings: Findings) -> dict[str, list[str]]:
    """The keys in which arms differ, with their values."""
    return {key: list(values) for key, values in values_by_key(findings).items() if len(values) > 1}


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(tree, list | tuple) and any(isinstance(value, Mapping) for value in tree):
        for index, value in enumerate(tree):
            yield from _leaves(f"{prefix}.{index}", value)
    else:
        yield prefix, "null" if tree is None else redacted(str(tree))
