"""The engines on one GPU: a plain loop's losses, the CPU's, and the same bits whatever is gathered or kept."""

from typing import Any

import pytest
import torch
from engines import LEARNING_RATE, MODEL, NUM_MICRO_BATCHES, OPTIMIZER, batch, shard, state_of, step_once
from torch import Tensor, nn

from launcher.engine.adamw import parameter_groups
from launcher.engine.build import checkpoint_activations_
from launcher.engine.contract import Engine
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks
from model.init import initialize_
from model.transformer import Transformer
from quant.config import PRESETS, QuantConfig
from quant.linear import quantize_, quantized_layers, set_strength_

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
STRENGTHS = [None] * 4 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 4
"""Of each step; None before the switch."""


def plain_losses(device: torch.device, dtype: torch.dtype) -> list[float]:
    """The oracle: whole batches, torch's own AdamW and clipping."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    model = model.to(device, dtype)
    groups = parameter_groups(((name, p.ndim, p) for name, p in model.named_parameters()), OPTIMIZER)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    losses = []
    for step, strength in enumerate(STRENGTHS):
        switch_(model, strength, device)
        loss = model(*(tensor.to(device) for tensor in batch(step))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def switch_(model: nn.Module, strength: float | None, device: torch.device, config: QuantConfig | None = None) -> None:
    if strength is None:
        return
    if not quantized_layers(model):
        quantize_(model, config or QuantConfig(), device)
    set_strength_(model, strength)


def build(name: str, dtype: torch.dtype, device: torch.device, *, how: str = "", **keys: Any) -> Engine:
    with torch.device("meta"):
        model = Transformer(MODEL)
    for block in model.model.layers:
        if how == "checkpointed":
            checkpoint_activations_(block)
        if how == "compiled":
            block.compile()
    return shard(model, name, dtype, device, **keys)


def engine_run(
    name: str, dtype: torch.dtype, device: torch.device, config: QuantConfig | None = None, **keys: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a run through the switch, and the state at its end."""
    engine = build(name, dtype, device, **keys)
    losses = []
    for step, strength in enumerate(STRENGTHS):
        switch_(engine.model, strength, device, config)
        loss, norm, skipped = step_once(engine, step)
        assert skipped == 0
        assert norm > 0
        losses.append(loss)
    return losses, state_of(engine)


def assert_near_through_the_switch(found: list[float], expected: list[float], limit: float) -> None:
    """In 16 bits within ``limit``; then a code on the other side of a tie moves the loss."""
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    first_rounded = STRENGTHS.index(0.25)
    assert max(differences[:first_rounded]) < limit
    assert max(differences) < 0.1


@pytest.mark.parametrize("name", ["fsdp2", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_an_engine_on_the_gpu_follows_a_plain_loop(name: str, only_rank: Ranks) -> None:
    if name != "fsdp2":
        pytest.importorskip("deepspeed")
    losses, _ = engine_run(name, torch.float32, only_rank.device)
    assert_near_through_the_switch(losses, plain_losses(only_rank.device, torch.float32), 1e-5)
    assert_near_through_the_switch(losses, plain_losses(CPU, torch.float32), 1e-5)


def test_in_fp64_the_gpu_is_tight_through_the_switch(only_rank: Ranks) -> None:
    """What is left is the last bit of the weights' scales, which are rounded to fp32."""
    losses, _ = engine_run("fsdp2", torch.float64, only_rank.device)
    expected = plain_losses(CPU, torch.float64)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6


def test_bf16_on_the_gpu_follows_the_cpu(only_rank: Ranks) -> None:
    losses, state = engine_run("fsdp2", torch.bfloat16, only_rank.device)
    expected, _ = engine_run("fsdp2", torch.bfloat16, CPU)
    assert_near_through_the_switch(losses, expected, 2e-2)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_can_be_repeated_bit_for_bit(dtype: torch.dtype, only_rank: Ranks) -> None:
    runs = [engine_run("fsdp2", dtype, only_rank.device) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert_same_state(runs[0][1], runs[1][1])


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", [None, "bitnet-b1.58", "nielsen-2025"])
def test_gathering_codes_changes_no_bit(preset: str | None, dtype: torch.dtype, only_rank: Ranks) -> None:
    config = QuantConfig() if preset is None else PRESETS[preset]
    expected = engine_run("fsdp2", dtype, only_rank.device, config)
    found = engine_run("fsdp2", dtype, only_rank.device, config, gather="codes")
    assert found[0] == expected[0]
    assert_same_state(found[1], expected[1])


@pytest.mark.parametrize(
    ("how", "keys"),
    [("checkpointed", {}), ("", {"reshard_after_forward": False}), ("checkpointed", {"gather": "codes"})],
    ids=["checkpointed", "kept gathered", "checkpointed and gathered as codes"],
)
def test_what_is_kept_changes_no_bit(how: str, keys: dict[str, Any], only_rank: Ranks) -> None:
    expected = engine_run("fsdp2", torch.bfloat16, only_rank.device)
    found = engine_run("fsdp2", torch.bfloat16, only_rank.device, how=how, **keys)
    assert found[0] == expected[0]
    assert_same_state(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_blocks_follow_eager_ones(dtype: torch.dtype, only_rank: Ranks) -> None:
    torch._dynamo.reset()
    expected, _ = engine_run("fsdp2", dtype, only_rank.device)
    losses, _ = engine_run("fsdp2", dtype, only_rank.device, how="compiled")
    assert_near_through_the_switch(losses, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    codes, _ = engine_run("fsdp2", dtype, only_rank.device, how="compiled", gather="codes")
    assert_near_through_the_switch(codes, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_offloaded_state_follows_state_on_the_gpu(only_rank: Ranks) -> None:
    expected, _ = engine_run("fsdp2", torch.bfloat16, only_rank.device)
    losses, state = engine_run("fsdp2", torch.bfloat16, only_rank.device, offload="all")
    assert_near_through_the_switch(losses, expected, 2e-2)
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison: float, only_rank: Ranks) -> None:
    engine = build("fsdp2", torch.bfloat16, only_rank.device)
    step_once(engine, 0)
    before = state_of(engine)
    _, norm, skipped = step_once(engine, 1, poison=poison)
    assert skipped == 1
    assert not torch.tensor(norm).isfinite()
    assert_same_state(state_of(engine), before)
    assert step_once(engine, 1)[2] == 0


@pytest.mark.parametrize("strength", [None, 0.5, 1.0], ids=["16-bit", "ramp", "ternary"])
@pytest.mark.parametrize("how", ["", "checkpointed", "compiled"])
def test_the_host_does_not_wait_for_the_device(how: str, strength: float | None, only_rank: Ranks) -> None:
    pytest.importorskip("streaming")
    from launcher.config.sections import OutlierConfig
    from launcher.training.guard import SpikeGuard
    from launcher.training.step import accumulate_gradients

    torch._dynamo.reset()
    engine = build("fsdp2", torch.bfloat16, only_rank.device, how=how)
    switch_(engine.model, strength, only_rank.device)
    guard = SpikeGuard(OutlierConfig(), smooths=True, ranks=only_rank)

    def step(number: int) -> None:
        tokens, labels = batch(number)
        halves = zip(tokens.chunk(NUM_MICRO_BATCHES), labels.chunk(NUM_MICRO_BATCHES), strict=True)
        found = accumulate_gradients(engine, halves, NUM_MICRO_BATCHES)
        norm, skipped = engine.step(StepSizes(LEARNING_RATE), grad_norm_limit=guard.limit(found.loss))
        guard.add(norm, skipped)

    for number in range(3):
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
