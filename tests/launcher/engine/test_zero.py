"""DeepSpeed's settings that change where it keeps the state: the state is what the model computes with, or none is."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from engines import CPU, MODEL, build, gathered, shard, step_once
from ranks import run_group

from launcher.errors import ConfigError
from model.transformer import Transformer

LAYOUTS: list[tuple[int, torch.dtype, dict[str, Any]]] = [
    (1, torch.bfloat16, {"parameter_alignment": True}),
    (2, torch.float32, {"parameter_alignment": True}),
    (2, torch.bfloat16, {"elastic_checkpoint": True, "contiguous_gradients": False, "reduce_bucket_size": 500}),
    (3, torch.float32, {"sub_group_size": 2000, "param_persistence_threshold": 0}),
    (3, torch.bfloat16, {"leaf_module": {"classes": ["model.transformer.Block"]}}),
]
"""Settings that are let through, of all those that change the layout, by stage and dtype."""


def computed(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    weights = {}
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            weights[name] = parameter.detach().clone()
    return weights


def states_and_weights() -> list[dict[str, Any]]:
    found = []
    for stage, dtype, zero in LAYOUTS:
        with torch.device("meta"):
            model = Transformer(MODEL)
        engine: Any = shard(model, f"zero-{stage}", dtype, CPU, deepspeed={"zero_optimization": zero})
        losses = [step_once(engine, step)[0] for step in range(2)]
        found.append({"losses": losses, "masters": gathered(engine, "weight"), "computed": computed(engine)})
        engine._engine.destroy()
    return found


def test_the_state_is_what_the_model_computes_with() -> None:
    results = run_group(2, states_and_weights)[0]
    for (_, dtype, zero), found in zip(LAYOUTS, results, strict=True):
        for name, weight in found["computed"].items():
            assert torch.equal(found["masters"][name].to(dtype), weight), (zero, name)
    for dtype in (torch.float32, torch.bfloat16):
        curves = [found["losses"] for (_, d, _), found in zip(LAYOUTS, results, strict=True) if d == dtype]
        for curve in curves:
            assert curve == pytest.approx(curves[0], abs=1e-6 if dtype == torch.float32 else 1e-2)


def shuffled() -> str:
    with torch.device("meta"):
        model = Transformer(MODEL)
    with pytest.raises(ConfigError) as caught:
        shard(model, "zero-2", torch.float32, CPU, deepspeed={"zero_optimization": {"round_robin_gradients": True}})
    return str(caught.value)


def test_a_layout_that_deepspeed_s_tables_do_not_tell_is_noticed() -> None:
    for said in run_group(2, shuffled):
        assert "parts of fp32 weights elsewhere than its tables say" in said


def skipped_on_purpose() -> dict[str, Any]:
    """Whether each stage has skipped a step whose norm was beyond its limit, and what DeepSpeed has logged of it."""
    import deepspeed

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    skipped = []
    for name in ("zero-0", "zero-1", "zero-2", "zero-3"):
        engine = build(name, torch.bfloat16)
        deepspeed.utils.logger.addHandler(handler)
        engine.step = partial(engine.step, grad_norm_limit=torch.tensor(-1.0))  # type: ignore[method-assign]
        skipped.append(step_once(engine, 0)[2])
        deepspeed.utils.logger.removeHandler(handler)
    return {"skipped": skipped, "logged": logged}


def test_a_step_that_is_skipped_on_purpose_is_not_called_non_finite() -> None:
    assert run_group(1, skipped_on_purpose) == [{"skipped": [1.0] * 4, "logged": []}]


REFUSED = [
    ({"steps_per_prnt": 3}, "engine.deepspeed.steps_per_prnt: DeepSpeed", "did you mean steps_per_print?"),
    ({"use_node_local_storage": True}, "engine.deepspeed.use_node_local_storage: DeepSpeed", "belongs to a section"),
    ({"zero_optimization": {"overlap_com": True}}, "engine.deepspeed: DeepSpeed", "overlap_com: Extra inputs are not"),
    ({"sparse_gradients": True}, "engine.deepspeed: DeepSpeed", "has been removed"),
    ({"activation_checkpointing": True}, "engine.deepspeed: DeepSpeed", "'bool' object has no attribute 'get'"),
    ({"flops_profiler": 3}, "engine.deepspeed: DeepSpeed", "refuses it"),
    ({"comms_logger": [1]}, "engine.deepspeed: DeepSpeed", "refuses it"),
]


def refused() -> list[str]:
    found = []
    for settings, *_ in REFUSED:
        with torch.device("meta"):
            model = Transformer(MODEL)
        with pytest.raises(ConfigError) as caught:
            shard(model, "zero-1", torch.float32, CPU, deepspeed=settings)
        found.append(str(caught.value))
    accepted = {"wall_clock_breakdown": False, "comms_logger": {"enabled": False}, "csv_monitor": {"enabled": False}}
    with torch.device("meta"):
        model = Transformer(MODEL)
    shard(model, "zero-1", torch.float32, CPU, deepspeed=accepted)
    return found


def test_keys_that_deepspeed_does_not_know_are_refused() -> None:
    (found,) = run_group(1, refused)
    for said, (_, begins, holds) in zip(found, REFUSED, strict=True):
        assert said.startswith(begins)
        assert holds in said
