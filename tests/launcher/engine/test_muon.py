"""Muon: torch's own as the oracle, the same bits however matrices are sharded, and never silently off."""

import copy
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import (
    LEARNING_RATE,
    MODEL,
    NUM_MICRO_BATCHES,
    OPTIMIZER,
    batch,
    build,
    gathered,
    state_of,
    step_once,
)
from ranks import run_ranks
from torch import Tensor, nn

from launcher.config.optimizer import MuonConfig, OptimizerConfig
from launcher.engine.adamw import parameter_groups, set_step_sizes
from launcher.engine.matrices import Exchange, Piece
from launcher.engine.muon import MuonAdamW, orthogonalize
from launcher.plan.muon import orthogonalize_flops
from launcher.plan.schedule import StepSizes
from model.init import initialize_
from model.size import is_matrix
from model.transformer import Transformer

NUM_STEPS = 6
MATRICES = [name for name, p in Transformer(MODEL).named_parameters() if is_matrix(name, p.ndim)]
CPU = torch.device("cpu")
SHAPES = {f"model.layers.{i}.w": shape for i, shape in enumerate([(5, 7), (7, 5), (1, 3), (9, 9), (16, 4), (2, 31)])}


def test_matrices_are_those_of_blocks():
    assert len(MATRICES) == 7 * MODEL.num_layers
    assert not any("norm" in name or "embed" in name for name in MATRICES)


@pytest.mark.parametrize("shape", [(5, 5), (3, 17), (17, 3), (64, 40), (1, 9)])
def test_singular_values_come_to_lie_around_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix, 5).double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(3, 4), 5), torch.zeros(3, 4, dtype=torch.bfloat16))


def drawn(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def muon_of(tensors: dict[str, Tensor], pieces: dict[Tensor, list[Piece]], group: Any, **keys: Any) -> MuonAdamW:
    """Muon over tensors that hold matrices, or parts of them."""
    config = OptimizerConfig(name="muon", learning_rate=LEARNING_RATE, muon=MuonConfig(**keys))
    groups = parameter_groups(((name, 2, tensor) for name, tensor in tensors.items()), config, with_muon=True)
    optimizer = MuonAdamW(groups, config, fused=True, device=CPU)
    optimizer.find_matrices(pieces, group)
    optimizer.turn(on=True)
    return optimizer


def whole_pieces(tensors: dict[str, Tensor]) -> dict[Tensor, list[Piece]]:
    return {t: [Piece(name, tuple(t.shape), 0, t.numel(), 0)] for name, t in tensors.items()}


@pytest.mark.parametrize(("scale", "theirs"), [("match-adamw", "match_rms_adamw"), ("shape", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_an_update_is_that_of_torchs_muon_bit_for_bit(scale, theirs, nesterov):
    ours = {name: nn.Parameter(value) for name, value in drawn(0).items()}
    other = copy.deepcopy(ours)
    optimizer = muon_of(ours, whole_pieces(ours), None, scale=scale, nesterov=nesterov, learning_rate=0.01)
    oracle = torch.optim.Muon(
        other.values(), lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for step in range(1, 5):
        for name, gradient in drawn(step).items():
            ours[name].grad, other[name].grad = gradient.clone(), gradient.clone()
        set_step_sizes(optimizer, StepSizes(LEARNING_RATE))
        optimizer.step()
        oracle.step()
    assert optimizer.updated == set(SHAPES)
    for name, value in other.items():
        assert torch.equal(ours[name], value), name
        assert torch.equal(optimizer.state[ours[name]]["exp_avg"], oracle.state[value]["momentum_buffer"])
        assert optimizer.state[ours[name]]["step"] == 4


def steps_on_flat_parts(rank: int, world_size: int, cuts: list[list[float]]) -> list[dict[str, list[float]]]:
    """Matrices in two flat buffers, cut anywhere, as ZeRO does; the whole weights after each step, of all ranks."""
    names = list(SHAPES)
    buffers, pieces, tensors = [names[:4], names[4:]], {}, {}
    spans: dict[str, tuple[int, int, int]] = {}
    for index, (inside, shares) in enumerate(zip(buffers, cuts, strict=True)):
        sizes = [math.prod(SHAPES[name]) for name in inside]
        ends = [round(share * sum(sizes)) for share in [0, *shares, 1]]
        begin, end = ends[rank], ends[rank + 1]
        tensor, first = nn.Parameter(torch.empty(end - begin)), 0
        tensors[f"model.layers.{index}.flat"], pieces[tensor] = tensor, []
        for name, size in zip(inside, sizes, strict=True):
            low, high = max(begin, first), min(end, first + size)
            length = max(0, high - low)
            offset, start = (low - begin, low - first) if length else (0, 0)
            pieces[tensor].append(Piece(name, SHAPES[name], start, length, offset))
            spans[name], first = (index, offset, length), first + size
    flat = list(tensors.values())

    def put(values: dict[str, Tensor], into: list[Tensor]) -> None:
        for held in pieces.values():
            for piece in held:
                index, offset, length = spans[piece.name]
                part = values[piece.name].flatten()[piece.start : piece.start + length]
                into[index].data[offset : offset + length] = part

    put(drawn(0), flat)
    optimizer = muon_of(tensors, pieces, dist.group.WORLD if world_size > 1 else None)
    results = []
    for step in range(1, 4):
        for tensor in flat:
            tensor.grad = torch.empty_like(tensor)
        put(drawn(step), [tensor.grad for tensor in flat])
        set_step_sizes(optimizer, StepSizes(LEARNING_RATE))
        optimizer.step()
        results.append([tensor.tolist() for tensor in flat])
    return results


@pytest.mark.parametrize(
    "cuts",
    [
        [[0.5], [0.31]],
        [[0.0, 0.2], [0.9, 0.9]],  # ranks without any part
        [[0.21, 0.5, 0.73], [0.1, 0.2, 0.3]],
    ],
)
def test_an_update_has_the_same_bits_however_matrices_are_cut(cuts):
    [whole] = run_ranks(1, steps_on_flat_parts, [[], []])
    parts = run_ranks(len(cuts[0]) + 1, steps_on_flat_parts, cuts)
    for step, expected in enumerate(whole):
        for buffer in (0, 1):
            assert list(itertools.chain(*(rank[step][buffer] for rank in parts))) == expected[buffer]


def owners_of(rank: int, world_size: int) -> list[tuple[str, ...]]:
    exchange = Exchange(
        [Piece(name, (64, 8 * (i + 1)), 0, 1, 0) for i, name in enumerate("abcdefghijk")], dist.group.WORLD
    )
    return exchange._rounds("abcdefghijk")


def test_the_work_is_shared():
    first, *others = run_ranks(3, owners_of)
    assert others == [first, first]
    assert Counter(filter(None, itertools.chain(*first))) == Counter("abcdefghijk")
    flops = {name: orthogonalize_flops((64, 8 * (i + 1)), 5) for i, name in enumerate("abcdefghijk")}
    work = [sum(flops.get(name, 0) for name in owned) for owned in zip(*first, strict=True)]
    assert max(work) < 1.15 * sum(work) / 3


def plain_run() -> tuple[list[float], dict[str, Tensor]]:
    """The oracle: whole batches, torch's Muon and AdamW; losses, and the momentum at the end."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    named = dict(model.named_parameters())
    muon = torch.optim.Muon(
        [named[name] for name in MATRICES], lr=LEARNING_RATE, weight_decay=OPTIMIZER.weight_decay, momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    rest = [(name, p.ndim, p) for name, p in named.items() if name not in MATRICES]
    adamw = torch.optim.AdamW(
        parameter_groups(rest, OPTIMIZER), lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    losses = []
    for step in range(NUM_STEPS):
        losses.append(0.0)
        for rows in zip(*(tensor.chunk(NUM_MICRO_BATCHES) for tensor in batch(step)), strict=True):
            loss = model(*rows).loss / NUM_MICRO_BATCHES
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: muon.state[named[name]]["momentum_buffer"] for name in MATRICES}


def engine_run(rank: int, world_size: int, name: str, keys: dict[str, Any]) -> tuple:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = build(name, torch.float32, muon=True, **keys)
    losses = [step_once(engine, step)[0] for step in range(NUM_STEPS)]
    assert engine.muon is not None
    momentum = {key: value.numpy() for key, value in gathered(engine, "exp_avg").items()}
    return losses, momentum, sorted(engine.muon.updated), sorted(gathered(engine, "exp_avg_sq"))


@pytest.mark.parametrize(
    ("world_size", "name", "keys"),
    [
        (2, "fsdp2", {}),
        pytest.param(1, "fsdp2", {}, marks=pytest.mark.slow),
        pytest.param(4, "fsdp2", {"replicas": 2}, marks=pytest.mark.slow),
        *(pytest.param(2, f"zero-{stage}", {}, marks=pytest.mark.slow) for stage in range(4)),
        (2, "zero-3", {"deepspeed": {"zero_optimization": {"sub_group_size": 9000}}}),
    ],
)
def test_every_engine_follows_torchs_muon(world_size, name, keys):
    """Sums of other orders move bf16 roundings of the momentum, so losses agree to 1e-4, momentum to 1e-6."""
    losses, momentum = plain_run()
    for found, found_momentum, updated, with_variance in run_ranks(world_size, engine_run, name, keys):
        assert updated == sorted(MATRICES)
        assert not set(with_variance) & set(MATRICES)
        assert found == pytest.approx(losses, abs=1e-4)
        for key, value in momentum.items():
            assert abs(found_momentum[key] - value.numpy()).max() < 2e-6, key


def skipping_run(rank: int, world_size: int, name: str) -> list[bool]:
    engine = build(name, torch.float32, muon=True)
    step_once(engine, 0)
    before = state_of(engine)
    outcomes = []
    for poison in (math.nan, math.inf):
        assert step_once(engine, 1, poison=poison)[2] == 1
        after = state_of(engine)
        outcomes.append(all(torch.equal(before[key], value) for key, value in after.items()))
    assert step_once(engine, 1)[2] == 0
    return outcomes


@pytest.mark.parametrize("name", ["fsdp2", "zero-2"])
def test_a_skipped_step_changes_nothing(name):
    assert run_ranks(2, skipping_run, name) == [[True, True]] * 2


def changing_run(rank: int, world_size: int, name: str) -> list[bool]:
    """AdamW, then Muon with its first moments, then AdamW anew; what holds, by rank."""
    engine = build(name, torch.float32, muon=False)
    assert engine.muon is not None
    for step in range(2):
        step_once(engine, step)
    held, before = [not engine.muon.updated], gathered(engine, "exp_avg")
    engine.muon.turn(on=True)
    after = gathered(engine, "exp_avg")
    held += [all(torch.equal(before[key], value) for key, value in after.items())]
    held += [not set(gathered(engine, "exp_avg_sq")) & set(MATRICES)]
    step_once(engine, 2)
    held += [engine.muon.updated == set(MATRICES)]
    engine.muon.turn(on=False)
    for kind in ("exp_avg", "exp_avg_sq"):
        found = gathered(engine, kind)
        held += [all(not found[key].any() for key in MATRICES), bool(found["model.embed_tokens.weight"].any())]
    held += [all(shard.step == 0 for shard in engine.shards() if shard.name in MATRICES)]
    engine.muon.updated.clear()
    step_once(engine, 3)
    return [*held, not engine.muon.updated]


@pytest.mark.parametrize(
    "name", ["fsdp2", "zero-3", *(pytest.param(f"zero-{stage}", marks=pytest.mark.slow) for stage in range(3))]
)
def test_the_optimizer_changes_in_the_course_of_a_run(name):
    for held in run_ranks(2, changing_run, name):
        assert all(held), held
