"""A minimal configuration, and what is wrong with it under overrides."""

import pytest

from launcher.config.file import apply_override, parse_config, parse_yaml
from launcher.errors import ConfigError

MINIMAL = """
run: {name: minimal}
model: {vocab_size: 64, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 24}
data: {sources: [{path: shards}], sequence_length: 8}
training: {global_batch_sequences: 4, micro_batch_sequences: 2}
optimizer: {learning_rate: 1e-3}
phases:
  - {precision: 16-bit, steps: 4}
  - {precision: ternary, steps: 6, quantization: {}, transition: {ramp: {}}}
"""


def tree(*overrides):
    result = parse_yaml(MINIMAL, "minimal")
    for override in overrides:
        apply_override(result, override)
    return result


def problems(*overrides):
    """Every problem of the minimal configuration with these overrides, by path."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(*overrides))
    lines = str(caught.value).splitlines()
    result = dict(line.split(": ", 1) for line in lines)
    assert len(result) == len(lines)
    return result


def only_problem(*overrides):
    found = problems(*overrides)
    assert len(found) == 1, found
    return next(iter(found.items()))
