"""DeepSpeed's universal checkpoints: those of its own making, and ours, from which plain DeepSpeed goes on."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_folders import FP32, NUM_STEPS, OPTIMIZER, assert_holds, continue_folders, copied
from ranks import run_group
from torch import Tensor

from launcher.checkpoint.source import KINDS, Source
from launcher.errors import CheckpointError
from launcher.formats.deepspeed_native import DeepSpeedSource, is_deepspeed
from launcher.formats.deepspeed_universal import UniversalSource, is_universal, write_universal


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


def test_weights_under_another_name_are_noticed(at_2: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """As `ds_to_universal` mistakes them if ``round_robin_gradients`` was on."""
    native = next((at_2[0] / "zero2").glob("global_step*"))
    folder = write_universal(DeepSpeedSource(native), tmp_path / "universal")
    shutil.copy(native / "mp_rank_00_model_states.pt", folder)
    names = [f"model.layers.{depth}.mlp.up_proj.weight" for depth in range(2)]
    UniversalSource(folder).read("weight", names[0], 0, 9)
    shutil.copy(folder / "zero" / names[1] / "fp32.pt", folder / "zero" / names[0] / "fp32.pt")
    with pytest.raises(CheckpointError, match=f"9 of 9 elements of {names[0]} are not what the model computed with"):
        UniversalSource(folder).read("weight", names[0], 0, 9)


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
    with pytest.raises(CheckpointError, match="already exists"):
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
    with pytest.raises(CheckpointError, match="which is not the bare name"):
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
        ("fp32.pt", {"other": 3}, "a/fp32.pt has no tensor where one should be"),
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
