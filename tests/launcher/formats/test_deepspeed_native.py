"""DeepSpeed's own folders, read: what plain DeepSpeed wrote, whole or damaged."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_folders import (
    AT_2,
    AT_3,
    BF16,
    FP32,
    MODEL,
    NUM_STEPS,
    RANK_1,
    Tied,
    assert_holds,
    copied,
    write_folders,
)
from ranks import run_group

from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import DeepSpeedSource, is_deepspeed
from launcher.formats.deepspeed_universal import is_universal
from launcher.formats.open import check_model, model_of, open_source
from launcher.inference.load import load_model
from model.hf import config_to_hf

EXTRA_AT_3 = [
    ("zero1x3-bf16", 1, BF16),
    ("zero1x3-bf16-in-fp32", 1, BF16 | {"accumulates_in_fp32": True, "round_robin_gradients": True}),
    ("zero1x3-elastic", 1, FP32 | {"elastic_checkpoint": True}),
    ("zero2x3-robin", 2, FP32 | {"round_robin_gradients": True}),
    ("zero1x3-robin-aligned", 1, BF16 | {"round_robin_gradients": True, "parameter_alignment": True}),
    ("zero2x3-frozen", 2, FP32 | {"model": "frozen"}),
    ("zero3x3-frozen", 3, FP32 | {"model": "frozen"}),
]


@pytest.mark.parametrize("name", [name for name, _, _ in AT_2 if "frozen" not in name])
def test_what_two_ranks_wrote(at_2: tuple[Path, dict[str, Any]], name: str) -> None:
    root, results = at_2
    assert is_deepspeed(root / name)
    assert not is_universal(root / name)
    source = DeepSpeedSource(root / name)
    assert set(source.shapes) == set(results[name]["truth"])
    assert_holds(source, results[name]["truth"])
    # Stage 0 in bf16 counts one step more: DeepSpeed's constructor takes it.
    assert {source.read_step(n) for n in source.shapes} == {NUM_STEPS + (name == "zero0-bf16")}
    assert any("data" in sentence for sentence in source.missing)
    assert any("numbers" in sentence for sentence in source.missing) == ("zero0" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _, _ in AT_3])
def test_what_three_ranks_wrote(at_3: tuple[Path, dict[str, Any]], name: str) -> None:
    root, results = at_3
    source = DeepSpeedSource(next((root / name).glob("global_step*")))
    assert_holds(source, results["written"][name]["truth"])
    assert set(source.shapes) == set(results["written"][name]["truth"])


@pytest.mark.slow
def test_what_three_ranks_wrote_in_other_ways(tmp_path: Path) -> None:
    results = run_group(3, write_folders, str(tmp_path), EXTRA_AT_3)[0]
    for name, _, _ in EXTRA_AT_3:
        assert_holds(DeepSpeedSource(tmp_path / name), results[name]["truth"])


@pytest.mark.parametrize("name", ["zero1-frozen", "zero3-frozen"])
def test_frozen_parameters_have_weights_and_empty_moments(at_2: tuple[Path, dict[str, Any]], name: str) -> None:
    root, results = at_2
    source = DeepSpeedSource(root / name)
    torch.manual_seed(0)
    expected = Tied(frozen=True)
    for parameter in ("scale.weight", "scale.bias"):
        weight = expected.get_parameter(parameter).detach()
        assert source.shapes[parameter] == tuple(weight.shape)
        assert torch.equal(source.read("weight", parameter, 0, weight.numel()), weight.flatten())
        assert source.read("exp_avg", parameter, 2, 4).tolist() == [0] * 4
        assert source.read_step(parameter) == 0
    assert_holds(source, results[name]["truth"])
    assert any("scale.bias" in sentence and "frozen" in sentence for sentence in source.missing)
    assert "head.weight" not in source.shapes
    assert "offset" not in source.shapes


@pytest.mark.parametrize(
    "name", ["zero2", "zero3", "zero3-frozen", "zero2-bf16", "zero1-aligned", "zero2-robin", "zero1-bf16-robin"]
)
def test_weights_are_those_of_zero_to_fp32(at_2: tuple[Path, dict[str, Any]], name: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    expected = get_fp32_state_dict_from_zero_checkpoint(str(at_2[0] / name))
    source = DeepSpeedSource(at_2[0] / name)
    assert set(source.shapes) == set(expected) - {"head.weight", "offset"}
    for parameter, shape in source.shapes.items():
        assert shape == tuple(expected[parameter].shape)
        assert torch.equal(
            source.read("weight", parameter, 0, expected[parameter].numel()), expected[parameter].flatten()
        )


def read_weights(source: DeepSpeedSource) -> None:
    for parameter, shape in source.shapes.items():
        source.read("weight", parameter, 0, torch.Size(shape).numel())


@pytest.mark.parametrize("name", ["zero2-bf16", "zero2"])
def test_an_unknown_order_of_the_weights_is_noticed(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    folder = copied(at_2[0] / name, tmp_path / "copy")
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    content["param_shapes"] = [dict(reversed(group.items())) for group in content["param_shapes"]]
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    source = DeepSpeedSource(folder)
    with pytest.raises(CheckpointError, match=r"elements of .* are not what the model computed with"):
        read_weights(source)


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3"])
def test_a_folder_of_transformers_trainer(at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    """DeepSpeed's files beside Hugging Face's, whose weights, where there are any, are rounded."""
    root, results = at_2
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(root / name, folder, ignore=shutil.ignore_patterns("*.py"))
    (folder / "config.json").write_text(json.dumps(config_to_hf(MODEL)))
    (folder / "model.safetensors").write_bytes(b"16-bit weights")
    source = open_source(str(folder))
    assert_holds(source, results[name]["truth"])
    assert model_of(source) == replace(MODEL, head_dim=MODEL.head_width)
    model = load_model(folder, dtype=torch.float32).model
    for parameter, value in model.named_parameters():
        assert torch.equal(value.flatten(), results[name]["truth"][parameter]["weight"]), parameter
    with pytest.raises(CheckpointError, match=r"model.norm_eps is 0.5, and 1e-05 in the checkpoint"):
        check_model(source, replace(MODEL, norm_eps=0.5))
    assert model_of(open_source(str(next(folder.glob("global_step*"))))) is None


def test_masters_of_stage_0_under_each_other_s_number_are_noticed(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = copied(at_2[0] / "zero0-bf16", tmp_path / "copy")
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    group = next(group for group in content["optimizer"]["fp32_groups"] if group[0].ndim > 1)
    group[:] = [next(other for other in reversed(group) if other.shape == master.shape) for master in group]
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    source = DeepSpeedSource(folder)
    with pytest.raises(CheckpointError, match="are not what the model computed with in bfloat16"):
        read_weights(source)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("zero2", lambda f: (f / RANK_1).unlink(), "written by 2 ranks, and rank 1's file of optim states is missing"),
        ("zero3", lambda f: (f / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink(), "model states is missing"),
        ("zero2", lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "mp_rank_00_model_states.pt is missing"),
        ("zero2", lambda f: shutil.copy(f / RANK_1, f / RANK_1.replace("1", "2", 1)), "rank 2's .* is there as well"),
        ("zero2", lambda f: shutil.copy(f / RANK_1, f / f"bf16_{RANK_1}"), "parts of two checkpoints"),
        ("zero2", lambda f: (f / "mp_rank_01_model_states.pt").touch(), "tensor or pipeline parallelism"),
        ("zero2", lambda f: (f / "layer_01-model_00-model_states.pt").touch(), "tensor or pipeline parallelism"),
        ("zero2", lambda f: (f / "layer_0_expert_0_mp_rank_00_model_states.pt").touch(), "mixture of experts"),
        ("zero2", lambda f: os.truncate(f / RANK_1, 3000), f"{RANK_1} is damaged, or was not written by torch.save"),
        ("zero2", lambda f: (f / RANK_1).write_bytes(b"PK" * 400), f"{RANK_1} is damaged, or was not written"),
        ("zero3", lambda f: (f / RANK_1).write_bytes(b""), f"{RANK_1} is damaged, or was not written"),
        ("zero3", lambda f: shutil.copy(f / RANK_1, f / "mp_rank_00_model_states.pt"), "does not hold what DeepSpeed"),
        ("zero3", lambda f: torch.save({"optimizer_state_dict": 3}, f / RANK_1), "does not hold what DeepSpeed"),
    ],
)  # fmt: skip
def test_damaged_folders(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, damage: Any, message: str
) -> None:
    folder = copied(at_2[0] / name, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        DeepSpeedSource(folder)


def test_ranks_of_different_saves(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = copied(at_2[0] / "zero3", tmp_path / "copy")
    content = torch.load(folder / RANK_1, weights_only=False)
    for state in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        state["step"] += 1
    torch.save(content, folder / RANK_1)
    with pytest.raises(CheckpointError, match="after different numbers of steps"):
        DeepSpeedSource(folder)


def test_latest_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match="latest names 'global_step7', but there is no such folder beside it"):
        DeepSpeedSource(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        DeepSpeedSource(tmp_path / "nowhere")


def test_weights_without_an_optimizer(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = copied(at_2[0] / "zero0-bf16", tmp_path / "copy")
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(content | {"optimizer": None}, folder / "mp_rank_00_model_states.pt")
    source = DeepSpeedSource(folder)
    assert not source.has_moments
    assert any("moments are missing" in sentence for sentence in source.missing)
    assert any("stored in bfloat16" in sentence for sentence in source.missing)
    expected = content["module"]["model.norm.weight"]
    assert torch.equal(source.read("weight", "model.norm.weight", 0, expected.numel()), expected.float())


def test_stage_0_refuses_to_guess(tmp_path: Path) -> None:
    weights = {"one": torch.ones(2, 3), "two": torch.zeros(2, 3)}
    states = {i: {"step": 1, "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)} for i in range(2)}
    content = {
        "module": weights, "buffer_names": [], "shared_params": None, "param_shapes": None,
        "optimizer": {"state": states, "param_groups": [{"params": [0]}, {"params": [1]}]},
    }  # fmt: skip
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="one may be any of 2"):
        DeepSpeedSource(tmp_path)
    content["optimizer"]["param_groups"] = [{"params": [0, 1]}]  # type: ignore[index]
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    assert DeepSpeedSource(tmp_path).read_step("two") == 1


def test_wrappers_prefixes_are_left_out(tmp_path: Path) -> None:
    content = {"module": {"module._orig_mod.a": torch.ones(2), "module._orig_mod.module.b": torch.ones(3)}}
    content |= {"buffer_names": [], "shared_params": None, "param_shapes": None, "optimizer": None}  # type: ignore[dict-item]
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    source = DeepSpeedSource(tmp_path)
    assert source.shapes == {"a": (2,), "module.b": (3,)}
    assert source.read("weight", "module.b", 1, 2).tolist() == [1, 1]
