"""Engines agree: with a plain training loop written here, and with each other.

In a 16-bit phase the losses and gradient norms of 20 steps agree within 1e-5. A ternary phase is chaotic (a change of
the weights by 1e-7 moves the loss by several hundredths within 20 steps, in one process), so there the first loss, the
first gradients, the codes and the scales are held tight, a few fp64 steps too, and the long curve stays inside what
such a change does.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import (
    CPU,
    ENGINES,
    LEARNING_RATE,
    MODEL,
    NUM_STEPS,
    OPTIMIZER,
    batch,
    build,
    gathered,
    shard,
    state_of,
    step_once,
)
from ranks import run_group
from torch import Tensor, nn

from launcher.engine.adamw import parameter_groups
from launcher.engine.contract import load_weights
from model.init import initial_value, initialize_
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import QuantLinear, quantize_, quantized_layers
from quant.rounding import quantize_weight

SETS = (("fsdp2", "zero-3"), ("zero-0", "zero-1", "zero-2"))
"""What a launch tries; the second one is slow."""
IN_SETS = pytest.mark.parametrize("names", [SETS[0], pytest.param(SETS[1], marks=pytest.mark.slow)], ids="+".join)
ONE_BY_ONE = pytest.mark.parametrize(
    "name", [*SETS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SETS[1])]
)


def plain_run(
    dtype: torch.dtype, *, quantized: bool, num_steps: int = NUM_STEPS, nudge: int | None = None
) -> dict[str, Any]:
    """The oracle: one process, whole batches, torch's own AdamW and clipping."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    model = model.to(dtype)
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 1e-7 * torch.randn(parameter.shape, generator=generator)
    codes = watch_codes(model, lambda layer: quantize_weight(layer.weight.detach())) if quantized else {}
    groups = parameter_groups(((name, p.ndim, p) for name, p in model.named_parameters()), OPTIMIZER)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    curve, first_moments = [], {}
    for step in range(num_steps):
        loss = model(*batch(step)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
        if step == 0:
            first_moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    return {"curve": curve, "first_moments": first_moments, "codes": codes}


def watch_codes(model: nn.Module, codes_of: Callable[[Any], tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize, and note the codes and the scale that each layer has in its first forward pass."""
    quantize_(model, QuantConfig(), CPU)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, _: Any) -> None:
            if name not in seen:
                codes, scale = codes_of(module)
                seen[name] = (codes.to(torch.int8), scale.clone())

        return hook

    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(look(name))
    return seen


def engine_run(name: str, dtype: torch.dtype, *, quantized: bool, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    with torch.device("meta"):
        model = Transformer(MODEL)
    codes = watch_codes(model, QuantLinear.weight_codes) if quantized else {}
    engine = shard(model, name, dtype)
    curve, first_moments = [], {}
    for step in range(num_steps):
        loss, norm, skipped = step_once(engine, step)
        assert skipped == 0
        curve.append((loss, norm))
        if step == 0:
            first_moments = gathered(engine, "exp_avg")
    return {"curve": curve, "first_moments": first_moments, "codes": codes}


def runs_of(names: tuple[str, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        results[f"{name}/16-bit"] = engine_run(name, torch.float32, quantized=False)
        results[f"{name}/ternary"] = engine_run(name, torch.float32, quantized=True)
    results["fsdp2/fp64"] = engine_run("fsdp2", torch.float64, quantized=True, num_steps=4)
    return results


@cache
def launch(names: tuple[str, ...]) -> dict[str, Any]:
    return run_group(2, runs_of, names)[0]


@pytest.fixture
def two_ranks(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Engines on two ranks, those of a set in one launch; what rank 0 saw."""
    name = request.getfixturevalue("name") if "name" in request.fixturenames else "fsdp2"
    return launch(next(names for names in SETS if name in names))


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {
        "16-bit": plain_run(torch.float32, quantized=False),
        "ternary": plain_run(torch.float32, quantized=True),
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any], column: int) -> list[float]:
    return [abs(a[column] - b[column]) for a, b in zip(ours["curve"], theirs["curve"], strict=True)]


@ONE_BY_ONE
def test_16_bit_phase_agrees_for_20_steps(name: str, two_ranks: dict[str, Any], single: dict[str, Any]) -> None:
    ours, theirs = two_ranks[f"{name}/16-bit"], single["16-bit"]
    assert max(differences(ours, theirs, 0)) < 1e-5
    assert max(differences(ours, theirs, 1)) < 1e-5
    assert any(norm > OPTIMIZER.max_grad_norm for _, norm in theirs["curve"])  # clipping took part


@ONE_BY_ONE
def test_ternary_phase_starts_equal(name: str, two_ranks: dict[str, Any], single: dict[str, Any]) -> None:
    ours, theirs = two_ranks[f"{name}/ternary"], single["ternary"]
    assert ours["codes"].keys() == theirs["codes"].keys()
    for layer, (codes, scale) in theirs["codes"].items():
        assert torch.equal(ours["codes"][layer][0], codes), layer
        assert torch.equal(ours["codes"][layer][1], scale), layer
    assert differences(ours, theirs, 0)[0] < 1e-6
    assert differences(ours, theirs, 1)[0] < 1e-6
    # After one step Adam's first moment is the clipped gradient, times 1 - beta1.
    for parameter, moment in theirs["first_moments"].items():
        torch.testing.assert_close(ours["first_moments"][parameter], moment, rtol=0, atol=1e-6, msg=parameter)


@pytest.fixture(scope="module")
def envelope(single: dict[str, Any]) -> float:
    """How far a change of the weights by 1e-7 moves the ternary loss within 20 steps."""
    nudged = [plain_run(torch.float32, quantized=True, nudge=seed) for seed in range(4)]
    return max(max(differences(run, single["ternary"], 0)) for run in nudged)


@ONE_BY_ONE
def test_ternary_phase_stays_inside_the_envelope(
    name: str, two_ranks: dict[str, Any], single: dict[str, Any], envelope: float
) -> None:
    assert 0 < max(differences(two_ranks[f"{name}/ternary"], single["ternary"], 0)) < 2 * envelope


def test_ternary_phase_in_fp64_is_tight(two_ranks: dict[str, Any]) -> None:
    theirs = plain_run(torch.float64, quantized=True, num_steps=4)
    assert max(differences(two_ranks["fsdp2/fp64"], theirs, 0)) < 1e-12


def computed_dtypes() -> dict[str, str]:
    found = {}
    for name in ("fsdp2", "zero-1", "zero-3"):
        engine = build(name, torch.bfloat16)
        layer = engine.model.get_submodule("model.layers.0.mlp.gate_proj")
        layer.register_forward_hook(lambda layer, _, output, name=name: found.update({name: f"{output.dtype}"}))
        engine.forward(*batch(0))
    return found


def test_every_engine_computes_in_the_compute_dtype() -> None:
    [found] = run_group(1, computed_dtypes)
    assert found == dict.fromkeys(["fsdp2", "zero-1", "zero-3"], "torch.bfloat16")


# State


def initial_weights(names: tuple[str, ...]) -> dict[str, Any]:
    results = {}
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            engine = build(name, dtype)
            results[f"{name}/{dtype}"] = gathered(engine, "weight")
    return results


@IN_SETS
@pytest.mark.parametrize("world_size", [1, 3])
def test_initial_weights_are_bitwise_the_same_on_any_number_of_ranks(world_size: int, names: tuple[str, ...]) -> None:
    plain = Transformer(MODEL)
    initialize_(plain, 0)
    for name, weights in run_group(world_size, initial_weights, names)[0].items():
        for parameter, value in plain.named_parameters():
            assert torch.equal(weights[parameter], value), f"{name}: {parameter}"


def skipped_steps(names: tuple[str, ...]) -> dict[str, Any]:
    """Per engine: what a poisoned step reports, whether it changed anything, and the step after it."""
    results: dict[str, Any] = {}
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            engine = build(name, dtype)
            twin = build(name, dtype)
            step_once(engine, 0)
            step_once(twin, 0)
            before = state_of(engine)
            poison = torch.nan if dist.get_rank() == 1 else 1.0
            _, _, skipped = step_once(engine, 1, poison)
            after = state_of(engine)
            unchanged = all(torch.equal(before[key], after[key]) for key in before)
            next_step = step_once(engine, 2) == step_once(twin, 2)
            updates = {float(shard.step) for shard in engine.shards()}
            results[f"{name}/{dtype}"] = [skipped, unchanged, next_step, sorted(updates)]
    return results


@IN_SETS
def test_a_non_finite_step_changes_nothing_on_any_rank(names: tuple[str, ...]) -> None:
    for rank in run_group(2, skipped_steps, names):
        for name, (skipped, unchanged, next_step, updates) in rank.items():
            assert skipped == 1, name
            assert unchanged, name
            assert next_step, name
            assert updates == [2.0], name  # two steps were taken; also: no engine begins at step 1


def written_weights(names: tuple[str, ...]) -> dict[str, Any]:
    """Write weights through the shards after a step, and look at what the forward pass then sees."""
    results = {}
    tokens, labels = batch(0)
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            engine = build(name, dtype)
            first = engine.forward(tokens, labels).loss.item()
            step_once(engine, 0)
            moved = engine.forward(tokens, labels).loss.item()
            load_weights(engine, lambda name, shape, rows: initial_value(name, shape, MODEL, 0, rows))
            results[f"{name}/{dtype}"] = [first, moved, engine.forward(tokens, labels).loss.item()]
    return results


@IN_SETS
def test_written_weights_reach_the_forward_pass(names: tuple[str, ...]) -> None:
    for name, (first, moved, restored) in run_group(2, written_weights, names)[0].items():
        assert moved != first, name
        assert restored == first, name


def parameter_names() -> list[Any]:
    return [[n for n, _ in build(name, torch.float32).model.named_parameters()] for name in ENGINES]


def test_names_are_the_models_own() -> None:
    plain = [name for name, _ in Transformer(MODEL).named_parameters()]
    assert run_group(1, parameter_names)[0] == [plain] * len(ENGINES)
