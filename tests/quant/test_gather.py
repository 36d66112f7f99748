"""Ternary weights that are gathered as codes: what is sent, and that it changes no bit of a run."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_group
from runs import run
from safetensors.torch import load_file
from tiny import tiny_config
from torch import Tensor

from launcher.config.file import ConfigError
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.plan.plan import make_plan
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from model.init import initial_value
from model.size import num_parameters
from quant.codes import pack_rows, unpack_rows
from quant.config import PRESETS, SCALES_OF_LEVELS, QuantConfig, gather_problems
from quant.gather import CodeGather, _fsdp_params
from quant.linear import quantized_layers
from quant.rounding import (
    SUMMED,
    magnitude_counts,
    scale_from_counts,
    scale_from_sums,
    scale_sums,
    weight_codes,
    weight_scale,
)


@given(st.integers(1, 40), st.integers(1, 1300), st.integers(1, 7), st.sampled_from(["absmean", "gaussian"]))
def test_ranks_find_the_scale_of_the_whole_matrix(O: int, I: int, num_ranks: int, weights: Any) -> None:  # noqa: E741
    config = QuantConfig(weights=weights)
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(O * I)) * 0.02
    sums_O = torch.cat([scale_sums(rows, config) for rows in weight_OI.chunk(num_ranks)])
    assert torch.equal(scale_from_sums(sums_O, I, config).level, weight_scale([weight_OI], config).level)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 7), st.sampled_from([0.0, 1e-30, 0.02, 1e30]))
def test_ranks_find_the_median_of_the_whole_matrix(O: int, I: int, num_ranks: int, size: float) -> None:  # noqa: E741
    config = QuantConfig(weights="absmedian")
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(O * I)) * size
    counts = torch.stack([magnitude_counts(rows) for rows in weight_OI.chunk(num_ranks)]).sum(0)
    assert torch.equal(scale_from_counts(counts, config).level, weight_scale([weight_OI], config).level)


def test_what_is_not_a_number_is_not_hidden() -> None:
    weight_OI = torch.tensor([[1.0, 2.0, math.nan, 3.0, math.inf]])
    for weights in ("absmean", "gaussian", "absmedian"):
        config = QuantConfig(weights=weights)
        if weights == "absmedian":
            scale = scale_from_counts(magnitude_counts(weight_OI), config)
        else:
            scale = scale_from_sums(scale_sums(weight_OI, config), 5, config)
        assert scale.level.isnan().all(), weights
        assert weight_scale([weight_OI], config).level.isnan().all(), weights
    infinite = scale_from_counts(
        magnitude_counts(torch.tensor([[1.0, math.inf, math.inf]])), QuantConfig(weights="absmedian")
    )
    assert infinite.level.isinf().all()


@given(st.integers(0, 9), st.integers(1, 23))
def test_packed_rows_are_the_codes_and_stay_rows(O: int, I: int) -> None:  # noqa: E741
    codes_OI = torch.randint(-1, 2, (O, I), generator=torch.Generator().manual_seed(I)).float()
    packed_OJ = pack_rows(codes_OI)
    assert packed_OJ.shape == (O, math.ceil(I / 4))
    assert torch.equal(unpack_rows(packed_OJ, I), codes_OI.to(torch.int8))
    assert torch.equal(pack_rows(codes_OI[1:]), packed_OJ[1:])


def test_scales_that_are_gathered_are_those_made_from_sums_or_counts() -> None:
    scales = set(SCALES_OF_LEVELS["ternary"])
    refused = {scale for scale in scales - {"learned"} if gather_problems(QuantConfig(weights=scale))}
    assert scales - {"learned"} - refused == SUMMED.keys() | {"absmedian"}


def test_recipes_that_can_be_gathered_as_codes() -> None:
    assert gather_problems(QuantConfig()) == {}
    assert {name: set(gather_problems(config)) for name, config in PRESETS.items()} == {
        "bitnet-b1.58": set(),
        "nielsen-2025": set(),
        "paretoq": {"weights", "granularity", "gradient"},
        "bitnet-v2": {"hadamard"},
        "quest": {"granularity", "gradient", "hadamard"},
    }


@pytest.mark.parametrize(
    ("engine", "quantization", "expected"),
    [
        (
            {"gather": "codes"},
            {"preset": "bitnet-v2"},
            "phases.1.quantization.hadamard: is outputs; engine.gather codes",
        ),
        ({"gather": "codes", "offload": "all"}, {}, "engine.gather: is codes, which are computed on the device"),
        ({"name": "deepspeed", "zero_stage": 1, "gather": "codes"}, {}, "engine.gather: is codes, which only fsdp2"),
    ],
)
def test_what_needs_latent_weights_is_refused(
    tmp_path: Path, engine: dict[str, Any], quantization: dict[str, Any], expected: str
) -> None:
    phases = [{"precision": "16-bit", "steps": 1}, {"precision": "ternary", "steps": 1, "quantization": quantization}]
    with pytest.raises(ConfigError, match=expected):
        tiny_config(tmp_path, tmp_path, engine=engine, phases=phases)


# On real ranks

PHASES = [
    {"precision": "16-bit", "steps": 2},
    {
        "precision": "ternary",
        "steps": 6,
        "quantization": {"fused": True},
        "transition": {"ramp": {"steps": 2, "order": "sensitivity", "rounding": "softmax"}},
    },
    {"precision": "ternary", "steps": 2, "quantization": {"preset": "nielsen-2025"}},
    {"precision": "16-bit", "steps": 2},
]
"""A ramp that some blocks end before others, another quantizer without a pass in between, and the way back."""

FIGURES = ("step", "train/loss", "train/grad_norm", "quant/zero_share", "quant/weight_error", "validation")


def train_in(shards: str, out: str, dtype: str, options: dict[str, Any], kinds: dict[str, list[int]]) -> None:
    for gather, pieces in kinds.items():
        config = tiny_config(
            Path(shards),
            Path(out) / gather,
            engine={"gather": gather} | options.get("engine", {}),
            training={"compute_dtype": dtype, "global_batch_sequences": 12, **options.get("training", {})},
            phases=PHASES,
            evaluation={"interval_steps": 1},
            logging={"interval_steps": 1, "tensorboard": False, "quantization_interval_steps": 3},
        )
        for steps in pieces:
            assert run(config, steps) == "interrupted"
        assert run(config) == "complete"


def run_both(shards: Path, out: Path, num_ranks: int, dtype: str, options: dict[str, Any]) -> None:
    """A run in codes that is stopped three times is the run in weights that is not: every figure, and every weight."""
    kinds = {"weights": [], "codes": [3, 3, 2]}
    run_group(num_ranks, train_in, str(shards), str(out), dtype, options, kinds)
    compare(out)


def compare(out: Path) -> None:
    rows, states = [], []
    for gather in ("weights", "codes"):
        found = list(read_metrics(out / gather / "metrics.jsonl"))
        rows.append([{key: row[key] for key in row if key.startswith(FIGURES)} for row in found])
        checkpoint = out / gather / "checkpoints" / "step-00000012"
        states.append([load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))])
    assert rows[0] == rows[1]
    assert sum("train/loss" in row for row in rows[0]) == 12
    for in_weights, in_codes in zip(*states, strict=True):
        assert in_weights.keys() == in_codes.keys()
        for name, value in in_weights.items():
            assert torch.equal(value, in_codes[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "dtype"), [(2, "bf16"), (1, "fp32")])
def test_gathering_codes_changes_no_bit(shards: Path, tmp_path: Path, num_ranks: int, dtype: str) -> None:
    run_both(shards, tmp_path, num_ranks, dtype, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (3, {}),
        (4, {"engine": {"replicas": 2}, "training": {"global_batch_sequences": 16}}),
        (2, {"engine": {"reshard_after_forward": False}}),
        (2, {"training": {"activation_checkpointing": True}}),
    ],
    ids=["three ranks", "replicas", "keep gathered", "activation checkpointing"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gathering_codes_changes_no_bit_of_other_engines(
    shards: Path, tmp_path: Path, num_ranks: int, dtype: str, options: dict[str, Any]
) -> None:
    run_both(shards, tmp_path, num_ranks, dtype, options)


@pytest.mark.slow
def test_compiled_models_gather_codes_too(shards: Path, tmp_path: Path) -> None:
    """In processes of their own, for what is compiled depends on what was before. Graphs differ, and how they round."""
    for gather in ("weights", "codes"):
        run_group(2, train_in, str(shards), str(tmp_path), "fp32", {"training": {"compile": True}}, {gather: []})
    in_weights, in_codes = (
        [row["train/loss"] for row in read_metrics(tmp_path / gather / "metrics.jsonl") if "train/loss" in row]
        for gather in ("weights", "codes")
    )
    assert len(in_weights) == 12
    assert in_codes[:2] == in_weights[:2]
    assert in_codes[2:] == pytest.approx(in_weights[2:], abs=0.01)


def stances_while_measured() -> list[str]:
    """Whether code may be compiled where codes are made for a measurement, which forces all else to be eager."""
    found, round_ = [], CodeGather._round

    def rounding(self: CodeGather) -> None:
        found.append(torch._dynamo.eval_frame._stance.stance)
        round_(self)

    CodeGather._round = rounding  # type: ignore[method-assign]
    config = tiny_config(
        Path("shards"), Path("run"), engine={"gather": "codes"}, phases=[{"precision": "ternary", "steps": 9}]
    )
    plan = make_plan(config, 1)
    engine: Any = build_engine(plan, plan.phases[0], Ranks(0, 1, 0, torch.device("cpu")))
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, 0, rows))
    tokens = torch.arange(33).expand(2, -1)
    engine.token_nll(tokens[:, :-1], tokens[:, 1:])
    return found


def test_codes_are_made_by_compiled_code_where_a_measurement_is_eager() -> None:
    assert run_group(1, stances_while_measured) == [["default"]]


def memory_and_references(gathers: list[str]) -> list[Any]:
    """Of engines that take a step of two micro-batches: the sums held amid it, and whether they go when let go of."""
    found = []
    for gather in gathers:
        for reduce in ("step", "micro-batch"):
            config = tiny_config(
                Path("shards"),
                Path("run"),
                engine={"gather": gather, "reduce_gradients": reduce},
                training={"compute_dtype": "bf16"},
                phases=[{"precision": "ternary", "steps": 9}],
            )
            size = dist.get_world_size()
            plan = make_plan(config, size)
            engine: Any = build_engine(plan, plan.phases[0], Ranks(dist.get_rank(), size, 0, torch.device("cpu")))
            load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, 0, rows))  # noqa: B023
            tokens = torch.arange(33).expand(2, -1) + dist.get_rank()
            engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss, last=False)
            sums = [
                param.unsharded_accumulated_grad
                for module in (engine.model, *engine.model.model.layers)
                for param in _fsdp_params(module)
            ]
            held = sum(tensor.numel() * tensor.element_size() for tensor in sums if tensor is not None)
            engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss, last=True)
            norm = engine.step(StepSizes(1e-3))[0].item()
            model = weakref.ref(engine.model)
            del engine, sums
            gc.collect()
            found.append((gather, reduce, held, norm, model() is None))
    return found


def test_engines_hold_the_sums_that_the_plan_says_and_go_when_they_are_let_go_of() -> None:
    """FSDP2 sums whole gradients over micro-batches in fp32, unless it reduces each. A rollback needs the memory."""
    found = run_group(2, memory_and_references, ["weights", "codes"])[0]
    parameters = num_parameters(tiny_config(Path("shards"), Path("run")).model)
    assert [row[2] for row in found] == [4 * parameters, 0] * 2
    norms = [row[3] for row in found]
    assert norms[:2] == norms[2:]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert all(row[4] for row in found), found


def what_layers_see(num_steps: int) -> list[dict[str, Any]]:
    """Of each step's forward pass: how layers were gathered, and what that takes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = tiny_config(
        Path("shards"), Path("run"), engine={"gather": "codes"}, phases=[{"precision": "ternary", "steps": 9}]
    )
    plan = make_plan(config, size)
    engine = build_engine(plan, plan.phases[0], Ranks(rank, size, rank, torch.device("cpu")))
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, config.model, 0, rows))
    layers = quantized_layers(engine.model)
    seen: list[dict[str, Any]] = []

    def look(layer: Any, inputs: Any) -> None:
        weight, codes = layer.weight, layer.held
        found = {"weight_bytes": weight.untyped_storage().nbytes(), "shape": tuple(weight.shape), "step": step}
        if codes is not None:
            found["packed_bytes"] = codes.codes.numel()
            found["codes"] = layer.weight_codes()[0].clone()
        seen.append(found)

    name, layer = next(iter(layers.items()))
    layer.register_forward_pre_hook(look)
    tokens = torch.arange(33).expand(2, -1)
    for step in range(num_steps):
        if step == 1:
            layer.probe = lambda layer, x: None
        whole = {shard.name: shard for shard in engine.shards()}[f"{name}.weight"]
        latent = torch.zeros(layer.weight.shape).flatten()
        latent[whole.start : whole.start + len(whole.tensors["weight"])] = whole.tensors["weight"]
        dist.all_reduce(latent)
        engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss, last=False)
        engine.backward(engine.forward(tokens[:, :-1], tokens[:, 1:]).loss, last=True)
        seen[-1]["latent"] = latent.view(layer.weight.shape)
        engine.step(StepSizes(1e-2))
        layer.probe = None
    return seen


def test_layers_hold_two_bits_a_weight_and_those_that_are_looked_at_hold_weights() -> None:
    """The tiny model's 36 x 36 query matrix in fp32, on 2 ranks; a probe looks at the second of three steps."""
    seen = run_group(2, what_layers_see, 3)[0]
    assert [row["step"] for row in seen] == [0, 0, 1, 1, 2, 2]
    for row in seen:
        assert row["shape"] == (36, 36)
        assert (row["weight_bytes"], row.get("packed_bytes")) == ((5184, None) if row["step"] == 1 else (4, 36 * 9))
    before, after = (seen[index]["codes"] for index in (1, 5))
    assert not torch.equal(before, after)
    for row in (seen[1], seen[5]):
        latent: Tensor = row["latent"]
        expected = weight_codes(latent, weight_scale([latent], QuantConfig()), QuantConfig())
        assert torch.equal(row["codes"], expected.to(torch.int8))
