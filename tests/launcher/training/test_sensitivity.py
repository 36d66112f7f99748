"""Blocks in the order of their sensitivity, and soft rounding, in runs that are stopped and go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config

import launcher.train
from launcher.errors import ConfigError, TrainingError
from launcher.formats.open import open_source
from launcher.plan.plan import make_plan
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.training.sensitivity import measure_sensitivity, order_of, sensitivity_note
from launcher.training.step import open_data
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import quantize_, quantized_layers
from quant.rounding import dequantize, quantize_weight

LAYERS, SWITCH, STEPS = 3, 4, 11
QUANTIZATION = QuantConfig(activations="none")


def soft_config(shards: str, folder: Path, engine: str = "fsdp2", ramp: Any = None, **sections: Any) -> Any:
    """4 steps in 16 bits, a ramp of 6 that is soft and goes by sensitivity, and one at full strength."""
    ramp = {"steps": 6, "order": "sensitivity", "rounding": "softmax"} if ramp is None else ramp
    ternary = {
        "precision": "ternary",
        "steps": STEPS - SWITCH,
        "quantization": {"activations": "none"},
        "transition": {"ramp": ramp},
    }
    return tiny_config(
        Path(shards),
        folder,
        model={"num_layers": LAYERS},
        engine=ENGINES[engine],
        phases=[{"precision": "16-bit", "steps": SWITCH}, ternary],
        checkpoint={"keep_last": 0},
        **sections,
    )


def manifest(folder: Path, step: int) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return tree


def state(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))]


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def whole_and_in_pieces(shards: str, out: str, engines: list[str], sections: dict[str, Any]) -> None:
    for engine in engines:
        assert run(soft_config(shards, Path(out) / engine / "whole", engine, **sections)) == "complete"
        pieces = soft_config(shards, Path(out) / engine / "pieces", engine, **sections)
        for steps in (SWITCH, 3, 2):  # at the switch, and twice on the ramp
            assert run(pieces, steps) == "interrupted"
        assert run(pieces) == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engines", "sections"),
    [
        (["fsdp2"], {}),
        (["zero-0", "zero-1", "zero-2", "zero-3"], {}),
        (["hsdp", "fsdp2-offload", "fsdp2-keep-gathered"], {}),
        pytest.param(
            ["fsdp2", "zero-1"],
            {"training": {"activation_checkpointing": True, "compute_dtype": "bf16"}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_stops_on_a_soft_ramp_goes_on_bitwise(
    shards: Path, tmp_path: Path, engines: list[str], sections: dict[str, Any]
) -> None:
    run_group(2, whole_and_in_pieces, str(shards), str(tmp_path), engines, sections)
    for engine in engines:
        whole, pieces = (tmp_path / engine / kind for kind in ("whole", "pieces"))
        for ours, theirs in zip(state(whole), state(pieces), strict=True):
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        for key in ("train/loss", "train/grad_norm", "quant/strength", "transition/sensitivity_1"):
            assert logged(whole, key) == logged(pieces, key)
        order = manifest(whole, STEPS)["progress"]["block_order"]
        rises = [logged(whole, f"transition/sensitivity_{depth}")[0] for depth in range(LAYERS)]
        assert order == sorted(range(LAYERS), key=rises.__getitem__)
        assert manifest(pieces, SWITCH)["progress"]["block_order"] is None  # before the switch
        on_ramp = manifest(pieces, SWITCH + 3)
        assert on_ramp["progress"]["block_order"] == order
        assert on_ramp["precision"]["rounding"] == "softmax"
        strengths = on_ramp["precision"]["weight_strengths"]  # of the step that ended there, the third of the ramp
        assert [strengths[depth] for depth in order] == [1, 0, 0]
        assert manifest(whole, STEPS)["precision"]["weight_strengths"] == [1] * LAYERS


def strengths_of_steps(shards: str, out: str, steps: int, measured: list[float] | None) -> list[list[float]]:
    """Run some steps; the weights' strengths in the ternary ones as the model has them.

    Instead of a measurement the sensitivity is what is given, or it must not be measured.
    """
    taken, found = launcher.train.train_step, []

    def observed_step(engine: Any, *arguments: Any, **options: Any) -> Any:
        layers = quantized_layers(engine.model).values()
        found.append([float(layer.weight_strength) for layer in {layer.depth: layer for layer in layers}.values()])
        return taken(engine, *arguments, **options)

    def given(*_: Any) -> list[float]:
        assert measured is not None, "the order is in the checkpoint"
        return measured

    launcher.train.train_step, launcher.train.measure_sensitivity = observed_step, given
    assert run(soft_config(shards, Path(out)), steps) == "interrupted"
    return [strengths for strengths in found if strengths]


def test_other_ranks_go_on_in_the_order_that_was_measured(shards: Path, tmp_path: Path) -> None:
    first, also = run_group(2, strengths_of_steps, str(shards), str(tmp_path), SWITCH + 3, [0.2, 0.3, 0.1])
    [then] = run_group(1, strengths_of_steps, str(shards), str(tmp_path), 3, None)
    assert first == also == [[0, 0, 0], [0, 0, 0.5], [0, 0, 1]]
    assert then == [[0.5, 0, 1], [1, 0, 1], [1, 0.5, 1]]


def run_a_few(shards: str, out: str) -> list[float]:
    """A run, and the rise of each block's loss by dense models with one block's weights dequantized."""
    config = soft_config(shards, Path(out))
    run(config, SWITCH + 1)
    source = open_source(str(Path(out) / "checkpoints" / f"step-{SWITCH:08d}"))
    data = open_data(make_plan(config, 1), Ranks(0, 1, 0, torch.device("cpu")), SWITCH)
    batches = [batch for batch, _ in zip(data, range(4), strict=False)]
    data.close()

    def loss(rounded: int | None) -> float:
        model = Transformer(config.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(source.read("weight", name, 0, parameter.numel()).view_as(parameter))
                if f"layers.{rounded}." in name and name.endswith("_proj.weight"):
                    parameter.copy_(dequantize(*quantize_weight(parameter, QUANTIZATION)))
            losses = [
                F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()) for tokens, labels in batches
            ]
        return float(torch.stack(losses).double().mean())

    plain = loss(None)
    return [loss(depth) - plain for depth in range(LAYERS)]


def test_sensitivity_is_what_rounding_a_block_adds_to_the_loss_of_the_next_batch(shards: Path, tmp_path: Path) -> None:
    [expected] = run_group(1, run_a_few, str(shards), str(tmp_path))
    measured = [logged(tmp_path, f"transition/sensitivity_{depth}")[0] for depth in range(LAYERS)]
    assert measured == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert len(set(measured)) == LAYERS


def measuring_leaves_no_trace(shards: str, out: str) -> None:
    run(soft_config(shards, Path(out) / "all", ramp={"steps": 0}))
    launcher.train.measure_sensitivity = measure_then_forget
    run(soft_config(shards, Path(out) / "measured", ramp={"steps": 1, "order": "sensitivity"}))
    run(soft_config(shards, Path(out) / "unmeasured", ramp={"steps": 1, "order": "front-to-back"}))


def measure_then_forget(*arguments: Any) -> list[float]:
    measure_sensitivity(*arguments)
    return [0.0] * LAYERS


@pytest.mark.slow
def test_to_measure_leaves_no_trace(shards: Path, tmp_path: Path) -> None:
    """Neither in the data nor in the weights, nor in the loss at the switch, which is of full strength."""
    run_group(1, measuring_leaves_no_trace, str(shards), str(tmp_path))
    for ours, theirs in zip(state(tmp_path / "measured"), state(tmp_path / "unmeasured"), strict=True):
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    losses = [logged(tmp_path / name, "validation/loss") for name in ("all", "measured", "unmeasured")]
    assert losses[1] == losses[2]
    assert losses[0][:3] == losses[1][:3]  # untrained, before the switch, after it


def change_the_order(shards: str, out: str) -> str:
    run(soft_config(shards, Path(out), ramp={"steps": 6}), SWITCH + 2)
    changed = soft_config(
        shards,
        Path(out),
        ramp={"steps": 6, "order": "sensitivity"},
        run={"name": "tiny", "folder": out, "allow_changes": ["phases.1.transition.ramp"]},
    )
    with pytest.raises(ConfigError) as caught:
        run(changed, 1)
    return str(caught.value)


def test_an_order_cannot_be_measured_after_the_switch(shards: Path, tmp_path: Path) -> None:
    [message] = run_group(1, change_the_order, str(shards), str(tmp_path))
    assert message.startswith("phases.1.transition.ramp.order: is sensitivity, which is measured at the switch, but ")


class Broken:
    """An engine whose loss is not finite."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def token_nll(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return torch.full(labels_BT.shape, float("inf"))


def measure_what_is_broken() -> str:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})])})
    quantize_(model, QuantConfig(include="proj"))
    ones, beats = torch.ones(1, 2, dtype=torch.int64), []
    batches = [(ones, ones)] * 3
    with pytest.raises(TrainingError) as caught:
        measure_sensitivity(Broken(model), batches, 1, lambda: beats.append(1))  # type: ignore[arg-type]
    assert len(beats) == 2 * 3  # a rank that measures is not one that hangs
    return str(caught.value)


def test_a_loss_that_is_not_finite_is_said() -> None:
    [message] = run_group(1, measure_what_is_broken)
    assert "set transition.ramp.order to front-to-back" in message


def test_the_least_sensitive_block_is_first_and_equal_ones_from_the_front() -> None:
    assert order_of([0.3, -0.1, 0.2]) == (1, 2, 0)
    assert order_of([0.0, 0.0, -1.0, 0.0]) == (2, 0, 1, 3)
    values, line = sensitivity_note([0.3, -0.1, 0.2])
    assert values == {
        "transition/sensitivity_0": 0.3,
        "transition/sensitivity_1": -0.1,
        "transition/sensitivity_2": 0.2,
    }
    assert line.endswith(": 1 (-0.1), 2 (+0.2), 0 (+0.3)")
