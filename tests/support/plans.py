"""Plans of a tiny configuration with some of its keys changed."""

import copy

import pytest

from launcher.config.file import apply_override, parse_config
from launcher.errors import ConfigError
from launcher.plan.plan import make_plan

TREE = {
    "run": {"name": "plan"},
    "model": {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24},
    "data": {"sources": [{"path": "shards"}], "sequence_length": 8},
    "training": {"global_batch_sequences": 24, "micro_batch_sequences": 2},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"shape": "linear", "warmup_steps": 2, "final_fraction": 0.0},
    "phases": [{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 6}],
}


def plan_of(*overrides, world_size=1):
    tree = copy.deepcopy(TREE)
    for override in overrides:
        apply_override(tree, override)
    return make_plan(parse_config(tree), world_size)


def refusal(*overrides, world_size=1):
    with pytest.raises(ConfigError) as caught:
        plan_of(*overrides, world_size=world_size)
    return str(caught.value)


def phases(*lengths):
    """Overrides for a 16-bit and a ternary phase of these lengths, each a `steps: 4` or the like."""
    precisions = ("16-bit", "ternary", "16-bit")
    return ["phases=[" + ", ".join(f"{{precision: {p}, {x}}}" for p, x in zip(precisions, lengths, strict=False)) + "]"]


def steps_of(plan):
    return [phase.end - phase.start for phase in plan.phases]
