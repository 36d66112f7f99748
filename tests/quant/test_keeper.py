"""Codes that are held between two changes of the weights: they change no bit, and are never old."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import assert_same_bits, build_input, forward_backward
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config
from torch import nn

import quant.held
import quant.linear
from launcher.run.metrics_log import read_metrics
from quant.config import PRESETS, QuantConfig
from quant.keeper import CodeKeeper
from quant.linear import add_learned_scales_, quantize_, quantized_layers, set_strength_

RECIPES = {
    name: QuantConfig(**(vars(config) | {"include": "", "fused": False})) for name, config in PRESETS.items()
} | {
    "int2 rows": QuantConfig(include="", levels="int2", granularity="row"),
    "groups": QuantConfig(include="", granularity="group", group_size=8),
    "dead zone": QuantConfig(include="", dead_zone_bias=1e-3),
    "clipped": QuantConfig(include="", gradient="clipped"),
    "16-bit inputs": QuantConfig(include="", activations="none"),
    "rotated": QuantConfig(include="", hadamard="all"),
    "rotated 16-bit inputs": QuantConfig(include="", hadamard="all", activations="none"),
}


def build(config: QuantConfig) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    model = nn.ModuleDict({"o_proj": layer})  # a name of those that hadamard outputs rotates
    if config.learned:
        add_learned_scales_(layer, config)
        with torch.no_grad():
            layer.weight_scale.mul_(0.02)
    quantize_(model, config)
    return layer


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_codes_change_no_bit(recipe: str, whole: bool, dtype: torch.dtype) -> None:
    layer, x = build(RECIPES[recipe]).to(dtype), build_input(dtype)
    expected = forward_backward(layer, x)
    keeper = CodeKeeper(layer, whole=whole, compiled=False)
    keeper.prepare()
    for _ in range(2):
        assert_same_bits(forward_backward(layer, x), expected)
    assert layer.held is not None
    kept = (torch.int8, (10, 24)) if "int2" in recipe else (torch.uint8, (10, 6))
    assert (layer.held.codes.dtype, layer.held.codes.shape) == kept


def test_a_ramp_holds_nothing() -> None:
    layer = build(QuantConfig(include=""))
    keeper = CodeKeeper(layer, whole=True, compiled=False)
    set_strength_(layer, 0.5)
    keeper.prepare()
    layer(build_input())
    assert layer.held is None


def test_codes_are_made_by_compiled_code_where_a_measurement_is_eager() -> None:
    layer = build(QuantConfig(include=""))
    keeper, stances = CodeKeeper(layer, whole=True, compiled=False), []

    def rounding(*given: Any) -> Any:
        stances.append(torch._dynamo.eval_frame._stance.stance)
        return quant.held.round_weights(*given)

    keeper._compiled = rounding
    with torch.compiler.set_stance("force_eager"):
        keeper.prepare()
    assert stances == ["default"]


def test_codes_are_made_once_for_as_long_as_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(name: str, module: Any) -> Callable[..., Any]:
        theirs = getattr(module, name)
        return lambda *arguments: made.append(1) or theirs(*arguments)

    for module in (quant.held, quant.linear, quant.product):
        monkeypatch.setattr(module, "weight_codes", counting("weight_codes", module))
    layer, x = build(QuantConfig(include="")), build_input()
    keeper = CodeKeeper(layer, whole=True, compiled=False)
    for _ in range(3):
        keeper.prepare()
        forward_backward(layer, x)
    assert len(made) == 1
    with torch.no_grad():
        layer.weight.mul_(-1)
    before = layer.held.codes.clone()
    keeper.fresh = False
    keeper.prepare()
    assert not torch.equal(layer.held.codes, before)
    assert len(made) == 2


def train_with_and_without(shards: str, out: str, engines: list[str], checkpointing: bool) -> None:
    for engine in engines:
        for held in (True, False):
            prepare = CodeKeeper.prepare
            if not held:
                CodeKeeper.prepare = lambda self: None  # type: ignore[method-assign]
            config = tiny_config(
                Path(shards),
                Path(out) / f"{engine}-{held}",
                engine=ENGINES[engine],
                training={"compute_dtype": "bf16", "activation_checkpointing": checkpointing},
                phases=[
                    {"precision": "16-bit", "steps": 1},
                    {"precision": "ternary", "steps": 4, "transition": {"ramp": {"steps": 2}}},
                ],
                evaluation={"interval_steps": 1},
            )
            assert run(config) == "complete"
            CodeKeeper.prepare = prepare  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero_trains_the_same_bits_with_held_codes(shards: Path, tmp_path: Path, checkpointing: bool) -> None:
    engines = ["zero-0", "zero-1", "zero-2", "zero-3"] if checkpointing else ["zero-1", "zero-3"]
    run_group(2, train_with_and_without, str(shards), str(tmp_path), engines, checkpointing)
    for engine in engines:
        held, made = (
            [
                [row.get(key) for key in ("step", "train/loss", "train/grad_norm", "validation/loss")]
                for row in read_metrics(tmp_path / f"{engine}-{on}" / "metrics.jsonl")
            ]
            for on in (True, False)
        )
        assert held == made, engine
        assert len(held) > 9


def test_quantized_layers_are_found_again_after_a_switch() -> None:
    layer, x = build(QuantConfig(include="")), build_input()
    keeper = CodeKeeper(layer, whole=True, compiled=False)
    keeper.prepare()
    quant.linear.dequantize_(layer)
    quantize_(layer, QuantConfig(include="", weights="absmean"))
    expected = forward_backward(layer, x)  # nothing is held yet, and nothing of before
    keeper.fresh = False
    keeper.prepare()
    assert_same_bits(forward_backward(layer, x), expected)
    assert all(each.held is not None for each in quantized_layers(layer).values())
