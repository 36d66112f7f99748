"""DeepSpeed's own files, in and out: plain DeepSpeed writes, and plain DeepSpeed goes on.

Nothing of ours but the model and its parameter groups takes part in the training here.
"""

import argparse
import logging
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_group
from torch import Tensor, nn

from launcher.deepspeed_native import DeepSpeedSource, is_deepspeed
from launcher.deepspeed_universal import UniversalSource, is_universal, write_universal
from launcher.optim import OptimizerConfig, build_adamw, parameter_groups
from launcher.pickled import Inert, PickledFile
from launcher.source import KINDS, CheckpointError, Source
from model.init import initialize_
from model.transformer import ModelConfig, Transformer

# Shapes that neither 2 nor 3 ranks divide.
MODEL = ModelConfig(
    vocab_size=67, hidden_size=18, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_size=29, sub_norm=True,
    max_sequence_length=16,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)
NUM_SEQUENCES, NUM_STEPS = 6, 3
Truth = dict[str, dict[str, Tensor]]


class Tied(nn.Module):
    """An embedding that is the output head too, and a layer that may be frozen."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 7)
        self.scale = nn.Linear(7, 7)
        self.middle = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 67, bias=False)
        self.head.weight = self.embed.weight
        self.scale.requires_grad_(not frozen)
        self.register_buffer("offset", torch.ones(7))

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.scale(self.embed(tokens_BT) + self.offset)))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels_BT.flatten())


def plain_engine(stage: int, *, bf16: bool, model: str = "transformer", universal: bool = False, **zero: Any) -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    torch.manual_seed(0)
    if model == "transformer":
        module: nn.Module = Transformer(MODEL)
        initialize_(module, 0)
    else:
        module = Tied(frozen=model == "frozen")
    trained = [(name, p.ndim, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizer = build_adamw(parameter_groups(trained, OPTIMIZER), OPTIMIZER, fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = {
        "train_micro_batch_size_per_gpu": NUM_SEQUENCES // dist.get_world_size(),
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.5,
        "checkpoint": {"load_universal": universal},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def train(engine: Any, first: int, num_steps: int) -> list[float]:
    """Mean losses of the same global batches on any number of ranks."""
    losses = []
    for step in range(first, first + num_steps):
        tokens = torch.randint(0, 67, (NUM_SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(mine[:, :-1], mine[:, 1:])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def truth_of(engine: Any, stage: int, *, bf16: bool) -> Truth:
    """What DeepSpeed itself says that it holds."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    outer, truth = engine.optimizer, {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            master = parameter
            if bf16:
                lows, highs = (
                    [p for group in groups for p in group] for groups in (outer.fp16_groups, outer.fp32_groups)
                )
                master = next(high for low, high in zip(lows, highs, strict=True) if low is parameter)
            state = engine.basic_optimizer.state[master]
            values = [master.detach(), state["exp_avg"], state["exp_avg_sq"]]
        else:
            if stage < 3:
                outer._hp_optimizer_states_linked = False  # else groups after the first have no moments on some ranks
                outer._lazy_init_hp_params_optimizer_state()
            moments = (safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:])
            values = [safe_get_full_fp32_param(parameter), *moments]
        truth[name] = {kind: value.flatten().clone() for kind, value in zip(KINDS, values, strict=True)}
    return truth


def write_folders(root: str, jobs: list[tuple[str, int, dict[str, Any]]]) -> dict[str, Any]:
    results = {}
    for name, stage, options in jobs:
        engine = plain_engine(stage, **options)
        train(engine, 0, NUM_STEPS)
        truth = truth_of(engine, stage, bf16=options["bf16"])
        engine.save_checkpoint(f"{root}/{name}", client_state={"args": argparse.Namespace(seed=3)})
        results[name] = {"truth": truth, "losses": train(engine, NUM_STEPS, NUM_STEPS)}
        engine.destroy()
    return results


def continue_folders(jobs: list[tuple[str, int, dict[str, Any]]]) -> list[list[float]]:
    curves = []
    for folder, stage, options in jobs:
        engine = plain_engine(stage, universal=True, **options)
        engine.load_checkpoint(folder)
        if stage == 3:
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()  # as `write_universal` says
        curves.append(train(engine, NUM_STEPS, NUM_STEPS))
        engine.destroy()
    return curves


def continue_and_write(continued: list[Any], root: str, written: list[Any]) -> dict[str, Any]:
    return {"curves": continue_folders(continued), "written": write_folders(root, written)}


FP32, BF16 = {"bf16": False}, {"bf16": True}
AT_2 = [
    ("zero0", 0, FP32),
    ("zero0-bf16", 0, BF16),
    ("zero1", 1, FP32),
    ("zero2-bf16", 2, BF16),
    ("zero2", 2, FP32),
    ("zero3", 3, FP32),
    ("zero1-frozen", 1, FP32 | {"model": "frozen"}),
    ("zero3-frozen", 3, FP32 | {"model": "frozen"}),
    ("zero0-tied", 0, FP32 | {"model": "tied"}),
    ("zero2-tied", 2, FP32 | {"model": "tied"}),
]
AT_3 = [
    ("zero2x3", 2, FP32),
    ("zero3x3", 3, FP32 | {"sub_group_size": 2000}),
    ("zero3x3-bf16", 3, BF16),
]
EXTRA_AT_3 = [
    ("zero1x3-bf16", 1, BF16),
    ("zero1x3-elastic", 1, FP32 | {"elastic_checkpoint": True}),
    ("zero2x3-robin", 2, FP32 | {"round_robin_gradients": True}),
    ("zero2x3-frozen", 2, FP32 | {"model": "frozen"}),
    ("zero3x3-frozen", 3, FP32 | {"model": "frozen"}),
]


@pytest.fixture(scope="module")
def at_2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("two")
    return root, run_group(2, write_folders, str(root), AT_2)[0]


@pytest.fixture(scope="module")
def at_3(tmp_path_factory: pytest.TempPathFactory, at_2: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """What three ranks write, and how they continue from what two ranks wrote and we converted."""
    root = tmp_path_factory.mktemp("three")
    for name in ("zero2", "zero3"):
        write_universal(
            DeepSpeedSource(at_2[0] / name), root / f"universal-{name}", learning_rate=OPTIMIZER.learning_rate / 4
        )
    continued = [(str(root / f"universal-{name}"), stage, FP32) for name, stage in (("zero3", 2), ("zero2", 3))]
    return root, run_group(3, continue_and_write, continued, str(root), AT_3)[0]


def assert_holds(source: Source, truth: Truth, num_ranges: int = 5) -> None:
    rng = random.Random(0)
    assert source.has_moments
    for name, kinds in truth.items():
        for kind, expected in kinds.items():
            assert torch.equal(source.read(kind, name, 0, len(expected)), expected), (name, kind)
            for _ in range(num_ranges):
                start = rng.randrange(len(expected))
                length = rng.randint(0, len(expected) - start)
                found = source.read(kind, name, start, length)
                assert found.dtype == torch.float32
                assert torch.equal(found, expected[start : start + length]), (name, kind, start, length)


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


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3-frozen", "zero2-bf16"])
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


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2-tied"])
def test_universal_checkpoints_of_deepspeeds_making(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.copytree(at_2[0] / name, tmp_path, dirs_exist_ok=True)
    native = next(tmp_path.glob("global_step*"))
    universal = tmp_path / "made_universal"
    main(
        argparse.Namespace(
            input_folder=str(native), output_folder=str(universal), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip
    assert is_universal(universal)
    assert not is_universal(tmp_path)  # `latest` is of the native one, beside it
    source = UniversalSource(universal)
    assert source.shapes == DeepSpeedSource(native).shapes
    assert_holds(source, at_2[1][name]["truth"], num_ranges=2)
    assert {source.read_step(n) for n in source.shapes} == {NUM_STEPS}


def test_plain_deepspeed_continues_at_three_ranks(
    at_2: tuple[Path, dict[str, Any]], at_3: tuple[Path, dict[str, Any]]
) -> None:
    curves = at_3[1]["curves"]
    for curve, name in zip(curves, ("zero3", "zero2"), strict=True):
        assert curve == pytest.approx(at_2[1][name]["losses"], abs=1e-6)
        assert len(set(curve)) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_plain_deepspeed_continues_everywhere(
    at_2: tuple[Path, dict[str, Any]], at_3: tuple[Path, dict[str, Any]], tmp_path: Path, num_ranks: int
) -> None:
    uninterrupted = at_2[1] | at_3[1]["written"]
    jobs, expected = [], []
    for name, root in (("zero0", at_2[0]), ("zero1", at_2[0]), ("zero2x3", at_3[0]), ("zero3x3", at_3[0])):
        write_universal(DeepSpeedSource(root / name), tmp_path / name, learning_rate=OPTIMIZER.learning_rate / 4)
        for stage in (1, 2, 3):
            jobs.append((str(tmp_path / name), stage, FP32))
            expected.append(uninterrupted[name]["losses"])
    for curve, losses, job in zip(run_group(num_ranks, continue_folders, jobs)[0], expected, jobs, strict=True):
        assert curve == pytest.approx(losses, abs=1e-6), job


def test_universal_checkpoint_of_ours_reads_back(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    native = DeepSpeedSource(at_2[0] / "zero3")
    tag = write_universal(native, tmp_path / "universal")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["universal"]
    assert is_universal(tmp_path / "universal")
    assert not is_deepspeed(tmp_path / "universal")
    source = UniversalSource(tmp_path / "universal")
    assert source.location == str(tag)
    assert source.shapes == native.shapes
    assert_holds(source, at_2[1]["zero3"]["truth"], num_ranges=1)
    assert {source.read_step(name) for name in source.shapes} == {NUM_STEPS}
    with pytest.raises(CheckpointError, match="there already"):
        write_universal(native, tmp_path / "universal")


def test_universal_checkpoint_is_whole_or_not_there(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    broken = copied(at_2[0] / "zero1", tmp_path / "broken")
    victim = broken / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged: the bytes of"):
        write_universal(DeepSpeedSource(broken), tmp_path / "universal")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def copied(folder: Path, to: Path) -> Path:
    """The tag's folder of a copy, without the scripts that DeepSpeed leaves there."""
    shutil.copytree(next(folder.glob("global_step*")), to, ignore=shutil.ignore_patterns("*.py"))
    return to


RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


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
    with pytest.raises(CheckpointError, match="latest names 'global_step7', and no such folder is beside it"):
        DeepSpeedSource(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        DeepSpeedSource(tmp_path / "nowhere")


def test_weights_without_an_optimizer(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = copied(at_2[0] / "zero0-bf16", tmp_path / "copy")
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(content | {"optimizer": None}, folder / "mp_rank_00_model_states.pt")
    source = DeepSpeedSource(folder)
    assert not source.has_moments
    assert any("moments are not there" in sentence for sentence in source.missing)
    assert any("stored in bfloat16" in sentence for sentence in source.missing)
    expected = content["module"]["model.norm.weight"]
    assert torch.equal(source.read("weight", "model.norm.weight", 0, expected.numel()), expected.float())


class Made(Source):
    """A source out of nothing."""

    def __init__(self, steps: dict[str, float], *, has_moments: bool = True, size: int = 4) -> None:
        self.location, self.has_moments = "made", has_moments
        self.shapes = dict.fromkeys(steps, (size,))
        self.steps = steps

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        return torch.full((length,), float(KINDS.index(kind) + 1))

    def read_step(self, name: str) -> float:
        return self.steps[name]


def test_universal_has_one_step_for_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="after 3 and after 5 steps"):
        write_universal(Made({"a": 3, "b": 5}), tmp_path / "universal")


@pytest.mark.parametrize("name", ["../../evil", "..", "", "a\\b"])
def test_names_that_would_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a folder"):
        write_universal(Made({name: 3}), tmp_path / "universal")
    assert list(tmp_path.iterdir()) == []


def test_universal_without_moments_starts_adam_anew(tmp_path: Path) -> None:
    write_universal(Made({"a": 3, "b": 5}, has_moments=False), tmp_path / "universal")
    source = UniversalSource(tmp_path / "universal")
    assert source.read("weight", "a", 1, 2).tolist() == [1, 1]
    assert source.read("exp_avg_sq", "a", 0, 4).tolist() == [0] * 4
    assert source.read_step("b") == 0


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("fp32.pt", {"other": 3}, "a/fp32.pt has something else where a tensor should be"),
        ("fp32.pt", torch.ones(5), "a/fp32.pt holds 5 elements instead of 4"),
        ("exp_avg.pt", {"param": torch.ones(3)}, "a/exp_avg.pt holds 3 elements instead of 4"),
        ("exp_avg_sq.pt", None, "lacks moments, which others have"),
        ("step.pt", "text", "'text' where a number should be"),
    ],
)
def test_damaged_universal_checkpoints(tmp_path: Path, file: str, value: Any, message: str) -> None:
    tag = write_universal(Made({"a": 3, "b": 3}), tmp_path / "universal")
    if value is None:
        (tag / "zero" / "a" / file).unlink()
    else:
        torch.save(value, tag / "zero" / "a" / file)

    def read_all() -> None:
        source = UniversalSource(tmp_path / "universal")
        source.read_step("a")
        source.read("exp_avg", "a", 0, 4)

    with pytest.raises(CheckpointError, match=message):
        read_all()


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk: a write fails half-way
    try:
        with pytest.raises(CheckpointError, match="universal cannot be written"):
            write_universal(Made({"a": 3}, size=10_000), tmp_path / "universal")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


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


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["model", "rank"])
def test_hostile_files_are_refused_and_not_run(at_2: tuple[Path, dict[str, Any]], tmp_path: Path, where: str) -> None:
    folder, marker = copied(at_2[0] / "zero2", tmp_path / "copy"), tmp_path / "marker"
    path = folder / ("mp_rank_00_model_states.pt" if where == "model" else RANK_1)
    content = torch.load(path, weights_only=False)
    torch.save(content | {"ds_config": Hostile(marker)}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read: its pickle asks for posix.system"):
        DeepSpeedSource(folder)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have worked


def test_only_listed_names_even_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": bytearray(b"1")}, path)
    with pytest.raises(CheckpointError, match=r"bytearray"):
        PickledFile(path)


def test_foreign_objects_are_inert(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"args": argparse.Namespace(seed=3), "size": torch.Size([2]), "kind": torch.bfloat16}, path)
    tree = PickledFile(path).tree
    assert isinstance(tree["args"], Inert)
    assert tree["args"].state == {"seed": 3}
    assert (tree["size"], tree["kind"]) == (torch.Size([2]), torch.bfloat16)


def replace_pickle(path: Path, pickled: bytes) -> None:
    """Put another pickle into a file, with a sound checksum, as an attacker would."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


def test_claims_of_huge_sizes_allocate_nothing(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("file/data.pkl")
    number = pickle.BININT1 + b"\4"
    assert number in pickled
    huge = pickle.LONG1 + b"\6" + (2**44).to_bytes(6, "little")
    replace_pickle(path, pickled.replace(number, huge))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = PickledFile(path)
    assert file.tree["a"].numel() == 2**44
    with pytest.raises(CheckpointError, match="larger than its record"):
        file.read(file.tree["a"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(30.0).reshape(5, 6)
    path = tmp_path / "file.pt"
    torch.save({"all": base, "rows": base[2:4], "columns": base[:, :2], "none": base[:0]}, path)
    file = PickledFile(path)
    assert torch.equal(file.read(file.tree["rows"]), base[2:4].flatten())
    assert torch.equal(file.read(file.tree["rows"], 3, 5), base[2:4].flatten()[3:8])
    assert file.read(file.tree["none"]).numel() == 0
    with pytest.raises(CheckpointError, match="strides"):
        file.read(file.tree["columns"])
    with pytest.raises(CheckpointError, match="holds 12 elements, not 13"):
        file.read(file.tree["rows"], 3, 10)
    with pytest.raises(CheckpointError, match="something else"):
        file.read("text")


VALUES = {
    "a": torch.arange(100.0),
    "b": torch.arange(40, dtype=torch.bfloat16).reshape(5, 8),
    "number": torch.tensor(7.0),
    "nested": [{"c": torch.ones(0)}, (1, 2.5, "text")],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "file.pt"
    torch.save(VALUES, path)
    return path, path.read_bytes()


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mutilated_files_give_one_error_or_the_same_values(sound: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = sound[0].with_name("mutilated.pt"), bytearray(sound[1])
    match data.draw(st.sampled_from(["cut", "flip", "bytes"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "bytes":
            start = data.draw(st.integers(0, len(content) - 1))
            new = data.draw(st.binary(min_size=1, max_size=16))
            content[start : start + len(new)] = new
    path.write_bytes(content)
    try:
        file = PickledFile(path)
        found = {name: file.read(file.tree[name]) for name in ("a", "b", "number")}
        tail = file.tree["nested"][1]
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert all(torch.equal(value, VALUES[name].flatten()) for name, value in found.items())
    assert tail == VALUES["nested"][1]


def places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in a tree of containers."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(*place, key) for key, _ in items] + [found for k, v in items for found in places(v, (*place, k))]


JUNK = (None, -1, 2**70, 0.5, "text", [], {}, [3], {"a": 3}, torch.ones(2), torch.ones(0), torch.Size([2, 3]))


@pytest.mark.parametrize("name", ["zero0-tied", "zero2-tied", "zero1-frozen", "zero3-frozen"])
def test_junk_anywhere_in_the_tree_gives_one_error(
    at_2: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    rng = random.Random(0)
    folder = copied(at_2[0] / name, tmp_path / "copy")
    num_refused = 0
    for path in sorted(folder.glob("*.pt")):
        content, sound_bytes = torch.load(path, weights_only=False), path.read_bytes()
        everywhere = [place for place in places(content) if place[0] not in ("ds_config", "args")]
        for place in rng.sample(everywhere, min(25, len(everywhere))):
            mutated = pickle.loads(pickle.dumps(content))
            parent = mutated
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = rng.choice(JUNK)
            torch.save(mutated, path)
            try:
                source = DeepSpeedSource(folder)
                for parameter, shape in source.shapes.items():
                    for kind in KINDS:
                        assert source.read(kind, parameter, 0, torch.Size(shape).numel()).dtype == torch.float32
            except CheckpointError:
                num_refused += 1
        path.write_bytes(sound_bytes)
    assert num_refused > 10
