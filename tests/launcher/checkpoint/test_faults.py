"""What may go wrong while a run writes, reads or computes, with real ranks: nothing is lost, and it is said clearly."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_group
from runs import run
from tiny import tiny_config, tiny_tree

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.file import parse_config
from launcher.errors import USER_ERRORS, CheckpointError, LogError, TrainingError
from launcher.run.metrics_log import read_metrics


def fill_disk_at(step: int, rank: int) -> None:
    """Let this rank write no more than a few bytes of a step's checkpoint: the kernel refuses the rest."""
    write = CheckpointWriter.write_rank

    def write_or_fail(writer: CheckpointWriter, *args: Any) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if writer.final.name == f"step-{step:08d}" and dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return write(writer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    CheckpointWriter.write_rank = write_or_fail  # type: ignore[method-assign]


def run_on_a_full_disk(shards: str, out: str, full_at: int) -> list[str]:
    fill_disk_at(full_at, rank=1)
    try:
        run(tiny_config(Path(shards), Path(out), checkpoint={"interval_steps": 1, "keep_last": 0}))
    except CheckpointError as error:
        return ["stopped", str(error)]
    return ["complete", ""]


def test_a_full_disk_costs_one_checkpoint(shards: Path, tmp_path: Path) -> None:
    for outcome, _ in run_group(2, run_on_a_full_disk, str(shards), str(tmp_path / "run"), 3):
        assert outcome == "complete"
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in (1, 2, 4, 5, 6, 7, 8)]  # no step 3, and nothing half-written


def test_a_full_disk_at_a_milestone_ends_the_run_and_the_one_before_loads(shards: Path, tmp_path: Path) -> None:
    for outcome, message in run_group(2, run_on_a_full_disk, str(shards), str(tmp_path / "run"), 4):
        assert outcome == "stopped"
        assert "step-00000004" in message
        assert "rank 1" in message
        assert "File too large" in message
        assert "GiB are free" in message
    newest = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-00000003"
    reader = CheckpointReader(newest)
    assert len(reader.read("exp_avg", "model.norm.weight", 0, 36)) == 36


def complete_run(shards: str, out: str) -> None:
    run(tiny_config(Path(shards), Path(out), checkpoint={"interval_steps": 1, "keep_last": 0}))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two ranks with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_group(2, complete_run, str(shards), str(out))
    return out


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))


def test_a_truncated_file_is_named_with_its_sizes_and_the_way_out(damaged: Path) -> None:
    path = damaged / "step-00000008" / "rank-00001.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        CheckpointError, match=rf"rank-00001\.safetensors has {size - 100} bytes instead of {size}"
    ) as e:
        CheckpointReader(damaged / "step-00000008")
    assert "Other checkpoints beside it: step-00000001" in str(e.value)


def test_a_missing_file_is_named(damaged: Path) -> None:
    (damaged / "step-00000008" / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is missing"):
        CheckpointReader(damaged / "step-00000008")


def test_a_folder_without_manifest_is_no_checkpoint(damaged: Path) -> None:
    (damaged / "step-00000008" / "manifest.json").unlink()
    assert complete_checkpoints(damaged)[-1].name == "step-00000007"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        CheckpointReader(damaged / "step-00000008")


def test_ranges_can_be_read_across_the_files_of_two_ranks(finished: Path) -> None:
    reader = CheckpointReader(finished / "checkpoints" / "step-00000008")
    name, length = "model.layers.0.mlp.up_proj.weight", 51 * 36
    whole = reader.read("weight", name, 0, length)
    for start, count in ((0, 1), (length // 2 - 50, 100), (length - 1, 1)):
        assert reader.read("weight", name, start, count).equal(whole[start : start + count])
    with pytest.raises(CheckpointError, match="holds only"):
        reader.read("weight", name, length - 5, 10)


def test_a_damaged_line_of_the_log_is_named(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run")) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"{", b"[", 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(LogError, match=r"metrics\.jsonl:3: not JSON"):
        read_metrics(path)
    assert issubclass(LogError, USER_ERRORS)  # reported in a sentence
    assert path.read_bytes() == b"".join(lines)


def resume_with(shards: str, out: str, sections: dict[str, Any]) -> list[str]:
    try:
        tree = tiny_tree(Path(shards), Path(out))
        for name, keys in sections.items():
            tree[name] = keys if isinstance(keys, list) else tree.get(name, {}) | keys
        run(parse_config(tree))
    except (CheckpointError, TrainingError) as error:
        return [type(error).__name__, str(error)]
    return ["complete", ""]


def test_other_data_are_refused_on_resume(finished: Path, shards: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for step in range(6, 9):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    other = {"data": {"shuffle_seed": 1}, "run": {"allow_changes": ["data"]}}  # which data cannot be
    [[kind, message]] = run_group(1, resume_with, str(shards), str(out), other)
    assert kind == "CheckpointError"
    assert "other data" in message


def test_a_model_of_other_shapes_is_refused_with_every_difference(finished: Path, shards: Path, tmp_path: Path) -> None:
    start = {
        "checkpoint": {"start_from": str(finished / "checkpoints" / "step-00000004")},
        "model": {"intermediate_size": 60, "sub_norm": True, "num_layers": 1},
    }
    [[kind, message]] = run_group(1, resume_with, str(shards), str(tmp_path / "run"), start)
    assert kind == "CheckpointError"
    assert "model.layers.0.mlp.down_proj.weight: [36, 51] in the checkpoint, [36, 60] in the model" in message
    assert "model.layers.0.self_attn.attn_sub_norm.weight: the model has it, the checkpoint does not" in message
    assert "model.layers.1.input_layernorm.weight: the checkpoint has it, the model does not" in message


def test_start_from_takes_the_weights_of_another_run(finished: Path, shards: Path, tmp_path: Path) -> None:
    start = {"checkpoint": {"start_from": str(finished / "checkpoints" / "step-00000008")}}
    [[outcome, _]] = run_group(1, resume_with, str(shards), str(tmp_path / "run"), start)
    assert outcome == "complete"
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    fresh = read_metrics(finished / "metrics.jsonl")[0]
    assert first["step"] == fresh["step"] == 0
    assert first["validation/loss"] < fresh["validation/loss"]


def test_a_run_whose_gradients_stay_non_finite_stops_with_advice_and_saves_nothing(
    shards: Path, tmp_path: Path
) -> None:
    # The first update throws the weights to 1e30: from then on no loss is finite.
    diverging = {
        "optimizer": {"learning_rate": 1e30},
        "phases": [{"precision": "16-bit", "steps": 40}],
        "schedule": {"shape": "constant"},
        "training": {"max_skipped_steps": 3},
        "checkpoint": {"interval_steps": 5},
    }
    for kind, message in run_group(2, resume_with, str(shards), str(tmp_path / "run"), diverging):
        assert kind == "TrainingError"
        assert "3 steps in a row" in message
        assert "optimizer.learning_rate" in message
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["train/skipped_steps"] == 3
    assert rows[-1]["step"] == 4
