"""That what is compiled is what runs: graph calls of every training step, whatever else a run does."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config

import launcher.train
import quant.gather
from launcher.engine import compiling
from launcher.engine.compiling import compile_report

BLOCKS, MICRO_BATCHES, STEPS = 2, 2, 10
PHASES = [
    {"precision": "16-bit", "steps": 2},
    {
        "precision": "ternary",
        "steps": 6,
        "transition": {
            "ramp": {"steps": 3, "order": "sensitivity", "rounding": "softmax"},
            "activation_ramp": {"steps": 2},
        },
    },
    {"precision": "ternary", "steps": 2, "quantization": {"preset": "nielsen-2025"}},
]
EVALUATING = {"interval_steps": 1, "sample_prompts": ["a"], "sample_tokens": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "checkpointed": {"training": {"activation_checkpointing": True}},
    "looked at": {"logging": {"quantization_interval_steps": 1}},
    "evaluated": {"evaluation": EVALUATING},
    "weights are gathered": {"engine": {"gather": "weights"}},
    "not resharded": {"engine": ENGINES["fsdp2-keep-gathered"]},
    "zero-1": {"engine": ENGINES["zero-1"]},
    "all": {
        "training": {"activation_checkpointing": True},
        "logging": {"quantization_interval_steps": 1},
        "evaluation": EVALUATING,
    },
}


def count_calls(shards: str, out: str, names: list[str], expected: int) -> None:
    """Train each variant, with graphs that are run as they are, and compare the calls of each step.

    What rounds the weights that are gathered as codes is no graph of a block, and is not compiled.
    """
    compiling.BACKEND = "eager"
    quant.gather.torch = SimpleNamespace(**vars(torch) | {"compile": lambda function, **_: function})  # type: ignore[assignment]
    taken = launcher.train.train_step

    def counted_step(*arguments: Any, **options: Any) -> Any:
        before = compiling.num_calls
        result = taken(*arguments, **options)
        calls.append(compiling.num_calls - before)
        return result

    launcher.train.train_step = counted_step
    for name in names:
        sections = VARIANTS[name]
        torch._dynamo.reset()
        calls: list[int] = []
        own = {key: keys for key, keys in sections.items() if key not in ("training", "logging")}
        config = tiny_config(
            Path(shards),
            Path(out) / name.replace(" ", "-"),
            training={
                "compile": True,
                "compute_dtype": "fp32",
                "global_batch_sequences": 4,
                **sections.get("training", {}),
            },
            logging={"interval_steps": 1, "tensorboard": False, **sections.get("logging", {})},
            phases=PHASES,
            **own,
        )
        assert run(config) == "complete"
        assert calls == [expected] * STEPS, (name, calls)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["all"], [*VARIANTS][:-1]], ids=["all", "each"])
def test_every_step_is_compiled_whatever_else_a_run_does(shards: Path, tmp_path: Path, names: list[str]) -> None:
    run_group(1, count_calls, str(shards), str(tmp_path), names, BLOCKS * MICRO_BATCHES)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (4, "step 3 is compiled: 4 graph calls"),
        (0, "WARNING: .* the model runs eager: step 3"),
        (52, "WARNING: .*parts"),
    ],
)
def test_what_runs_eager_is_said(calls: int, expected: str) -> None:
    assert re.match(expected, compile_report(3, calls, 4))
