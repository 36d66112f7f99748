"""The optimizer over a switch and while ternary, against an Adam by hand; and that a run that goes on does the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import CPU, ENGINES, LEARNING_RATE, MODEL, NUM_SEQUENCES, OPTIMIZER, batch, gathered
from ranks import run_group
from runs import ENGINES as ENGINE_CONFIGS
from runs import run
from safetensors.torch import load_file
from tiny import tiny_config
from torch import Tensor, nn

from launcher.config.engine import EngineConfig
from launcher.config.transition import LearningRateDrop, OptimizerChoice, RollbackConfig, TransitionConfig
from launcher.engine.adamw import is_decayed
from launcher.engine.contract import Engine, load_weights
from launcher.engine.fsdp import FSDPEngine
from launcher.engine.zero import ZeroEngine
from launcher.formats.convert import convert_to_run
from launcher.formats.open import open_source
from launcher.plan.schedule import StepSizes
from launcher.run.metrics_log import read_metrics
from launcher.training.switch import carry_optimizer_
from model.init import initial_value, initialize_
from model.transformer import Transformer

FACTOR, TERNARY_FACTOR, SWITCH, NUM_STEPS = 3.0, 0.5, 2, 5
TERNARY = {f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(2) for name in ("gate", "up", "down")}


def build_grouped(name: str) -> Engine:
    """An engine in which the parameters of `TERNARY` have a learning rate of their own."""
    with torch.device("meta"):
        model = Transformer(MODEL)
    common: dict[str, Any] = {"optimizer": OPTIMIZER, "compute_dtype": torch.float32, "device": CPU, "ternary": TERNARY}
    if name == "fsdp2":
        engine: Engine = FSDPEngine(model, list(model.model.layers), config=EngineConfig(), **common)
    else:
        stage: Any = int(name[-1])
        engine = ZeroEngine(
            model,
            config=EngineConfig(name="deepspeed", zero_stage=stage),
            micro_batch_sequences=NUM_SEQUENCES // dist.get_world_size(),
            num_micro_batches=1,
            **common,
        )
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, MODEL, 0, rows))
    return engine


def decay_factor(step: int) -> float:
    return 1.0 if step < 4 else 0.0


def engine_steps(cases: list[tuple[str, OptimizerChoice]]) -> dict[str, Any]:
    """Weights and moments of each engine after a few steps with a transition among them."""
    results = {}
    for name, choice in cases:
        engine = build_grouped(name)
        rows = NUM_SEQUENCES // dist.get_world_size()
        for step in range(NUM_STEPS):
            if step == SWITCH:
                carry_optimizer_(engine, choice, FACTOR)
            tokens, labels = (part[dist.get_rank() * rows :][:rows] for part in batch(step))
            engine.backward(engine.forward(tokens, labels).loss, last=True)
            factor = TERNARY_FACTOR if step >= SWITCH else 1.0
            engine.step(StepSizes(LEARNING_RATE, factor, decay_factor(step)))
        results[f"{name}/{choice}"] = {kind: gathered(engine, kind) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    return results


def adam_by_hand(choice: OptimizerChoice) -> dict[str, dict[str, Tensor]]:
    """The same in one process (arXiv 1412.6980, algorithm 1; 1711.05101 for the decay)."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    (beta1, beta2), eps = OPTIMIZER.betas, OPTIMIZER.eps
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    updates = 0
    for step in range(NUM_STEPS):
        if step == SWITCH:
            updates = 0 if choice == "reset" else updates
            scale = {"keep": (1, 1), "reset": (0, 0), "keep-variance": (0, 1), "rescale": (FACTOR, FACTOR**2)}[choice]
            first = {name: scale[0] * moment for name, moment in first.items()}
            second = {name: scale[1] * moment for name, moment in second.items()}
        model.zero_grad()
        model(*batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        updates += 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                assert gradient is not None
                rate = LEARNING_RATE * (TERNARY_FACTOR if step >= SWITCH and name in TERNARY else 1.0)
                decay = (
                    OPTIMIZER.weight_decay * decay_factor(step) if is_decayed(name, parameter.ndim, OPTIMIZER) else 0
                )
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
                mean = first[name] / (1 - beta1**updates)
                root = (second[name] / (1 - beta2**updates)).sqrt()
                parameter.copy_(parameter * (1 - rate * decay) - rate * mean / (root + eps))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"weight": weights, "exp_avg": first, "exp_avg_sq": second}


def test_adam_by_hand_over_a_switch_with_rates_and_decay_by_group() -> None:
    choices: list[OptimizerChoice] = ["keep", "reset", "keep-variance"]
    cases = [(name, "rescale") for name in ENGINES] + [("fsdp2", choice) for choice in choices]
    results = run_group(2, engine_steps, cases)[0]
    by_hand = {choice: adam_by_hand(choice) for choice in (*choices, "rescale")}  # type: ignore[list-item]
    for case, kinds in results.items():
        expected = by_hand[case.split("/")[1]]
        for kind, parameters in kinds.items():
            for name, value in parameters.items():
                # A gradient of 1e-8 has rounding errors of its own size, and Adam makes an update of it all the same.
                tolerance = 2e-4 if kind == "weight" else 1e-5
                torch.testing.assert_close(value, expected[kind][name], rtol=1e-3, atol=tolerance, msg=f"{case} {name}")
    apart = by_hand["rescale"]["weight"], by_hand["keep"]["weight"]
    assert max(float((apart[0][name] - apart[1][name]).abs().max()) for name in TERNARY) > 2e-3


# Runs

SWITCH_CONFIG: dict[str, Any] = {
    "optimizer": "rescale",
    "activation_ramp": {"shape": "staircase", "stairs": 2, "steps": 2, "delay_steps": 1},
    "ramp": {"shape": "cosine", "steps": 4, "order": "front-to-back"},
    "learning_rate_drop": {"factor": 0.5, "tokens": 600},
}


def switched(shards: str, folder: Path, engine: str = "fsdp2", **sections: Any) -> Any:
    """A run of 4 steps in 16 bits and 5 ternary ones that uses all there is."""
    optimizer = {"learning_rate": 3e-3, "max_grad_norm": 100.0, "weight_decay_until": 0.5}
    transition = SWITCH_CONFIG | sections.pop("transition", {})
    return tiny_config(
        Path(shards),
        folder,
        engine=ENGINE_CONFIGS[engine],
        optimizer=optimizer | sections.pop("optimizer", {"ternary_learning_rate_factor": 1.5}),
        phases=[{"precision": "16-bit", "steps": 4}, {"precision": "ternary", "steps": 5, "transition": transition}],
        **sections,
    )


def final_state(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted((folder / "checkpoints" / "step-00000009").glob("*.safetensors"))]


def assert_same_end(one: Path, other: Path) -> None:
    for ours, theirs in zip(final_state(one), final_state(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], f"{one} and {other}"


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def runs_with_a_measured_factor(shards: str, out: str, engines: list[str]) -> None:
    for engine in engines:
        folder = Path(out) / engine
        run(switched(shards, folder / "whole", engine))
        for steps in (4, 2, 1):  # right at the switch, and twice in the ramps
            assert run(switched(shards, folder / "pieces", engine), steps) == "interrupted"
        run(switched(shards, folder / "pieces", engine))
        [factor] = logged(folder / "whole", "transition/rescale_factor")
        run(switched(shards, folder / "given", engine, transition={"rescale_factor": factor}))
    if engines[0] != "fsdp2":
        return
    folder = Path(out)
    abrupt = {"ramp": {"steps": 0}, "activation_ramp": None}
    run(switched(shards, folder / "abrupt", transition=abrupt))
    run(tiny_config(Path(shards), folder / "unswitched", optimizer={"learning_rate": 3e-3, "max_grad_norm": 100.0},
                    phases=[{"precision": "16-bit", "steps": 9}]))  # fmt: skip
    # Without groups of its own in 16 bits, converted at the switch, and then with them.
    plain = switched(shards, folder / "plain", optimizer={})
    run(plain)
    start = {"start_from": str(folder / "plain" / "checkpoints" / "step-00000004"), "start_phase": 1}
    converted = switched(shards, folder / "converted", checkpoint=start)
    if dist.get_rank() == 0:
        convert_to_run(converted, open_source(start["start_from"]))
    dist.barrier()
    run(converted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines",
    [
        ["fsdp2"],
        ["zero-0", "zero-1"],
        ["zero-2", "zero-3"],
        ["fsdp2-offload", "hsdp", "zero-2-offload", "zero-3-offload"],
    ],
)
def test_a_switch_that_measures_is_resumed_and_converted_bitwise(shards: Path, tmp_path: Path, engines: Any) -> None:
    run_group(2, runs_with_a_measured_factor, str(shards), str(tmp_path), engines)
    for engine in engines:
        whole, pieces, given = (tmp_path / engine / kind for kind in ("whole", "pieces", "given"))
        assert_same_end(whole, pieces)
        assert_same_end(whole, given)  # to measure has left no trace: not in the data, the moments or the weights
        for key in ("train/loss", "quant/strength", "quant/activation_strength", "transition/rescale_factor"):
            assert logged(whole, key) == logged(pieces, key)
        assert logged(whole, "quant/activation_strength") == [0, 0, 0.5, 1, 1]
        assert logged(whole, "quant/strength") == pytest.approx([0] * 4 + [0, 0.25, 0.5, 0.75, 1], abs=1e-12)
    if engines[0] == "fsdp2":
        # The first ternary step's gradient, against that of the same batch in a run that goes on in 16 bits.
        [factor] = logged(tmp_path / "abrupt", "transition/rescale_factor")
        after, before = (logged(tmp_path / kind, "train/grad_norm")[4] for kind in ("abrupt", "unswitched"))
        assert factor == pytest.approx(after / before, rel=1e-5)
        assert factor != pytest.approx(1, abs=1e-2)
        assert logged(tmp_path / "fsdp2" / "whole", "transition/rescale_factor") == [pytest.approx(factor, rel=1e-6)]
        assert_same_end(tmp_path / "fsdp2" / "whole", tmp_path / "converted")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TransitionConfig(rescale_factor=2.0), {"rescale_factor"}),
        (
            lambda: TransitionConfig(optimizer="rescale", rescale_factor=0.0, rewarm_tokens=-1),
            {"rescale_factor", "rewarm_tokens"},
        ),
        (lambda: LearningRateDrop(factor=1.0, tokens=0), {"factor", "tokens"}),
        (
            lambda: RollbackConfig(after_tokens=0, ramp_factor=1.0, max_attempts=0),
            {"after_tokens", "ramp_factor", "max_attempts"},
        ),
    ],
)
def test_problems_are_named_all_at_once(make: Any, named: set[str]) -> None:
    with pytest.raises(ValueError, match=r"is |has no effect") as caught:
        make()
    assert set(caught.value.args[0]) == named
