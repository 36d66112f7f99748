"""Steps of each kind, on a GPU as on the CPU: documents kept apart, chats, pairs, soft ramps, Muon and calibration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from devices import CPU, GPU, every_device
from engines import LEARNING_RATE, OPTIMIZER, state_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from launcher.config.engine import EngineConfig
from launcher.engine import compiling
from launcher.engine.build import checkpoint_activations_
from launcher.engine.compiling import compile_blocks_
from launcher.engine.contract import load_weights
from launcher.engine.fsdp import FSDPEngine
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks
from launcher.run.references import KnownRows
from launcher.training.calibration import calibrate_
from launcher.training.reference import KnownReference, digest_of
from launcher.training.step import accumulate_gradients
from model.config import ModelConfig, PreferenceConfig
from model.documents import MARKED, block_mask
from model.init import initial_value
from model.loss import IGNORED_LABEL, gradient_of_logits
from model.transformer import Transformer
from quant.config import CalibrationConfig, QuantConfig
from quant.linear import quantize_, quantized_layers, set_strength_

MODEL = ModelConfig(
    vocab_size=257, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=104, sub_norm=True,
    max_sequence_length=256,
)  # fmt: skip
LENGTH, DOCUMENT, NUM_MICRO_BATCHES = 256, 32, 2
STRENGTHS = (None, None, 0.1, 0.6, 1.0, 1.0)
"""Of each step; None before the switch."""
RUNS = [
    ("masked", ""),
    ("masked", "compiled"),
    ("masked", "checkpointed and compiled"),
    ("sft", ""),
    ("sft", "compiled"),
    ("dpo", "checkpointed"),
    ("dpo", "compiled"),
]
"""The data, and what is done to blocks."""
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""How far losses may be from those on the CPU; after the switch a code may differ."""


@pytest.fixture
def flex_attends(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex attention run on the CPU too, where torch computes it without a kernel of its own."""
    if device.type == "cpu":
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        compiled = torch.compile(flex_attention, backend="aot_eager", dynamic=False)
        monkeypatch.setattr("model.documents._compiled", lambda: compiled)
        monkeypatch.setattr("model.documents.blocks_work", lambda *_: True)
        monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def build(device: torch.device, dtype: torch.dtype, *, how: str = "", muon: bool | None = None) -> FSDPEngine:
    with torch.device("meta"):
        model = Transformer(MODEL)
    blocks = list(model.model.layers)
    for block in blocks:
        if "checkpointed" in how:
            checkpoint_activations_(block)
    if "compiled" in how:
        compile_blocks_(blocks)
        model.gradient_of_logits = torch.compile(gradient_of_logits, backend=compiling.BACKEND, dynamic=False)
    engine = FSDPEngine(
        model, blocks, optimizer=OPTIMIZER, config=EngineConfig(), compute_dtype=dtype, device=device, muon=muon
    )
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, MODEL, 0, rows))
    return engine


def micro_batch(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Two rows of documents in pairs, which count in part; the second row of an even seed has padding."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, MODEL.vocab_size, (2, LENGTH // DOCUMENT, 1), generator=generator)
    tokens = (starts + torch.randint(1, 4, (2, LENGTH // DOCUMENT, DOCUMENT), generator=generator).cumsum(-1)) % 256 + 1
    tokens[..., 0] = 0
    labels = tokens.flatten(1).roll(-1, 1).view_as(tokens).clone()
    labels[..., -1] = IGNORED_LABEL
    if kind in ("sft", "dpo"):
        labels[..., : DOCUMENT // 2] = IGNORED_LABEL
        tokens[..., 0] = ~tokens[..., 0]
        if seed % 2 == 0:
            labels[1, 2:] = IGNORED_LABEL
    return tokens.flatten(1), labels.flatten(1)


def batches(step: int, kind: str) -> list[tuple[Tensor, Tensor]]:
    return [micro_batch(NUM_MICRO_BATCHES * step + index, kind) for index in range(NUM_MICRO_BATCHES)]


def reference_of(num_steps: int) -> KnownReference:
    """A made-up one, which knows all rows; each answer has a log-probability of its own."""
    rows = KnownRows()
    for step in range(num_steps):
        for batch in batches(step, "dpo"):
            for row in zip(*batch, strict=True):
                if digest := digest_of(*row):
                    rows.add({digest: [-80.0 - place % 3 for place in range(LENGTH // DOCUMENT)]})
    return KnownReference(PreferenceConfig(beta=0.2), "made up", rows)


def stepping(engine: FSDPEngine, kind: str, num_steps: int) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    engine.keep_apart({"joined": None, "masked": 0}.get(kind, MARKED))
    teacher = reference_of(num_steps) if kind == "dpo" else None

    def step(number: int) -> tuple[Tensor, Tensor, Tensor]:
        uneven = kind in ("sft", "dpo")
        ahead = iter(batches(number, kind))
        found = accumulate_gradients(engine, ahead, NUM_MICRO_BATCHES, uneven=uneven, teacher=teacher)
        return found.loss, *engine.step(StepSizes(LEARNING_RATE))

    return step


def switch_(engine: FSDPEngine, strength: float | None) -> None:
    if strength is None:
        return
    if not quantized_layers(engine.model):
        quantize_(engine.model, QuantConfig(), engine.device, rounding="softmax")
    set_strength_(engine.model, strength)


def run(engine: FSDPEngine, kind: str) -> list[float]:
    """Losses of steps through a switch with a soft ramp; then, on a GPU, the host waits for the device in none."""
    step, losses = stepping(engine, kind, len(STRENGTHS) + 2), []
    for number, strength in enumerate(STRENGTHS):
        switch_(engine, strength)
        loss, norm, skipped = step(number)
        assert skipped == 0
        assert norm > 0
        losses.append(loss.item())
    with never_waiting(engine.device):
        for number, strength in enumerate((0.6, 1.0), start=len(STRENGTHS)):
            switch_(engine, strength)
            step(number)
    return losses


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Make each wait of the host for a GPU an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def assert_near(found: list[float], expected: list[float], limit: float) -> None:
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(differences[: STRENGTHS.index(0.1)]) < limit, differences
    assert max(differences) < 0.1, differences


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize(
    ("kind", "how", "device"),
    [
        pytest.param(
            *each, device, marks=pytest.mark.gpu if device == GPU else pytest.mark.slow if each != RUNS[0] else ()
        )
        for each, device in product(RUNS, (CPU, GPU))
    ],
    ids=str,
)
def test_steps_follow_those_of_an_eager_model_on_the_cpu(
    kind: str, how: str, device: torch.device, only_rank: Ranks, flex_attends: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a plain mask keeps documents apart, here flex attention."""
    torch._dynamo.reset()
    masks: list[Tensor] = []
    monkeypatch.setattr("model.documents.block_mask", lambda first_BT: masks.append(first_BT) or block_mask(first_BT))
    dtype = torch.bfloat16 if "compiled" in how else torch.float32
    calls_before = compiling.num_calls
    engine = build(device, dtype, how=how)
    found = run(engine, kind)
    num_passes = NUM_MICRO_BATCHES * (len(STRENGTHS) + 2)
    assert len(masks) == num_passes
    assert compiling.num_calls - calls_before == (num_passes * MODEL.num_layers if "compiled" in how else 0)
    set_strength_(engine.model, 0.0)
    tokens = micro_batch(0, kind)[0]
    evaluated = engine.logits(tokens)
    assert len(masks) == num_passes + 1
    monkeypatch.setattr("model.documents.blocks_work", lambda *_: False)
    plain = engine.logits(tokens)
    engine.keep_apart(None)
    joined = engine.logits(tokens.where(tokens >= 0, ~tokens))
    assert relative_error(evaluated, plain) < 2e-2 < 5e-2 < relative_error(joined, plain)
    assert_near(found, run(build(CPU, dtype), kind), LIMITS[dtype])


@every_device
def test_muon_follows_the_cpu(device: torch.device, only_rank: Ranks) -> None:
    losses = []
    for where in (CPU, device):
        engine = build(where, torch.float32, muon=True)
        losses.append(run(engine, "joined"))
        assert engine.muon is not None
        assert engine.muon.updated == engine.muon.matrices
        assert len(engine.muon.matrices) == 7 * MODEL.num_layers
    assert_near(losses[1], losses[0], 2e-2)
    before = state_of(engine)
    tokens, labels = (each.to(device) for each in micro_batch(0, "joined"))
    engine.backward(engine.forward(tokens, labels).loss * torch.nan, last=True)
    assert engine.step(StepSizes(LEARNING_RATE))[1] == 1
    after = state_of(engine)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
@every_device
@pytest.mark.parametrize("method", ["error-feedback", "scales"])
def test_a_calibration_follows_the_cpu(method: str, device: torch.device, only_rank: Ranks, flex_attends: None) -> None:
    found = []
    for where in (CPU, device):
        engine = build(where, torch.float32)
        engine.keep_apart(MARKED)
        quantize_(engine.model, QuantConfig(), where)
        calibration = CalibrationConfig(sequences=4, method=method)  # type: ignore[arg-type]
        calibrated = calibrate_(engine, calibration, batches(0, "sft"))
        assert calibrated.error_after < calibrated.error_before
        found.append((calibrated.error_before, calibrated.error_after))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
