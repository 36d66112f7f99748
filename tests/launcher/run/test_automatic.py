"""`auto` is decided when a run first starts, by the first rank's device, and never again."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import run_group, run_ranks
from runs import StopAfter
from tiny import tiny_config, tiny_tree
from typer.testing import CliRunner

from launcher.cli import app
from launcher.config.file import parse_config
from launcher.errors import ConfigError
from launcher.plan.plan import make_plan
from launcher.process.ranks import Ranks
from launcher.run import automatic
from launcher.run.automatic import slow_choices, values_of_run
from launcher.run.folder import RunFolder, holds_run
from launcher.run.metrics_log import read_metrics
from launcher.run.smoke import smoke_config

KEY = "training.compute_dtype"
LINE = "training.compute_dtype: "


def auto_tree(shards: Path, run: Path) -> dict[str, Any]:
    """Of a run whose compute dtype is left to its default; two steps of each of two phases."""
    tree = tiny_tree(shards, run)
    del tree["training"]["compute_dtype"]
    tree["training"]["compile"] = False
    tree["phases"] = [{"precision": "16-bit", "steps": 2}, {"precision": "ternary", "steps": 2}]
    return tree


def run_here(tree: dict[str, Any], steps: int | None = None, *, has_bf16: bool, smoke: bool = False) -> tuple[int, str]:
    """Run on a processor that has bf16 or not, perhaps only some steps; returns the exit code and the output."""
    import launcher.pretrain
    import launcher.report.ending

    torch.set_num_threads(1)
    launcher.report.ending.show_ending = lambda folder, console: None
    launcher.pretrain.StopRequest = lambda at_step: StopAfter(steps or 10**6)  # type: ignore[assignment, misc]
    automatic.has_bf16 = lambda: has_bf16  # type: ignore[assignment]
    config = parse_config(tree)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = launcher.pretrain.run(smoke_config(config) if smoke else config, 1 if smoke else None)
    return code, output.getvalue()


def stored_dtypes(run: Path) -> set[str]:
    paths = [run / "config.yaml", *run.glob("checkpoints/step-*/config.yaml")]
    assert len(paths) > 1
    return {yaml.safe_load(path.read_text())["training"]["compute_dtype"] for path in paths}


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def stopped_and_moved(rank: int, world_size: int, shards: str, out: str) -> list[Any]:
    told = auto_tree(Path(shards), Path(out) / "told")
    told["training"]["compute_dtype"] = "fp32"
    tree = auto_tree(Path(shards), Path(out) / "run")
    whole = run_here(told, has_bf16=True)
    first = run_here(tree, 2, has_bf16=False)
    between = stored_dtypes(Path(out) / "run")
    return [whole, run_here(tree, has_bf16=False, smoke=True), first, between, run_here(tree, has_bf16=True)]


def test_a_run_goes_on_in_the_dtype_that_the_first_device_chose(shards: Path, tmp_path: Path) -> None:
    """Against a run that is given fp32 and is never stopped."""
    [(results)] = run_ranks(1, stopped_and_moved, str(shards), str(tmp_path))
    (whole_code, whole), (smoke_code, smoke), (first_code, first), between, (last_code, last) = results
    assert [whole_code, smoke_code, first_code, last_code] == [0, 0, 3, 0]
    assert LINE not in whole
    for output in (smoke, first):
        assert output.count(f"{LINE}fp32, because this processor only emulates bf16\n") == 1, output
    assert last.count(f"{LINE}fp32, as this run began\n") == 1, last
    assert between == stored_dtypes(tmp_path / "run") == {"fp32"}
    assert losses(tmp_path / "run") == losses(tmp_path / "told")


@pytest.mark.parametrize(
    ("has_bf16", "has_int8", "has_pairs", "has_gcc"),
    [
        (True, True, False, False),
        (False, False, False, True),
        (None, True, False, False),
        (False, False, True, True),
        (False, False, True, False),
    ],
)
def test_what_is_slow_on_a_processor_is_said(
    has_bf16: bool | None, has_int8: bool, has_pairs: bool, has_gcc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(automatic, "CPU_HAS_INT8", has_int8)
    monkeypatch.setattr(automatic, "CPU_HAS_PAIRS", has_pairs)
    monkeypatch.setattr("quant.kernels.avx2.library", lambda: object() if has_gcc else None)
    phases = [
        {"precision": "16-bit", "steps": 2},
        {"precision": "ternary", "steps": 2},
        {"precision": "ternary", "steps": 2, "quantization": {"backward": "int8-input"}},
    ]
    config = tiny_config(Path("shards"), Path("run"), training={"compute_dtype": "bf16"}, phases=phases)
    plan = make_plan(config, 1)
    said = " ".join(slow_choices(plan, torch.device("cpu")))
    assert ("compute_dtype is bf16" in said) == (has_bf16 is False)
    assert ("backward is int8-input" in said) == (not has_int8 and not (has_pairs and has_gcc))
    assert slow_choices(plan, torch.device("cuda")) == []
    fast = tiny_config(Path("shards"), Path("run"), training={"compute_dtype": "fp32"}, phases=phases[:2])
    assert slow_choices(make_plan(fast, 1), torch.device("cpu")) == []


def begun(tree: dict[str, Any], dtype: str | None) -> RunFolder:
    """The folder of a run that has begun in a dtype; None: of a version without the key."""
    folder = RunFolder(parse_config(tree | {"training": tree["training"] | {"compute_dtype": dtype or "bf16"}}))
    folder.claim()
    folder.prepare([2, 2])
    folder.note_start(0, 1)
    if dtype is None:
        stored = yaml.safe_load((folder.path / "config.yaml").read_text())
        del stored["training"]["compute_dtype"]
        (folder.path / "config.yaml").write_text(yaml.safe_dump(stored))
    return folder


@pytest.mark.parametrize(("stored", "other"), [("bf16", "fp32"), ("fp32", "bf16"), (None, "fp32")])
def test_auto_is_no_change_and_another_value_is_one(tmp_path: Path, stored: str | None, other: str) -> None:
    tree = auto_tree(Path("shards"), tmp_path / "run")
    folder, config = begun(tree, stored), parse_config(tree)
    RunFolder(config).check_configuration()
    assert holds_run(folder.path, config)
    assert values_of_run(folder)[KEY] == (stored or "bf16")
    changed = parse_config(tree | {"training": tree["training"] | {"compute_dtype": other}})
    assert not holds_run(folder.path, changed)
    run_id = yaml.safe_load((folder.path / "config.yaml").read_text())["run_id"]
    assert holds_run(folder.path, changed, run_id)
    assert not holds_run(folder.path, config, "another")
    with pytest.raises(ConfigError, match=rf"{KEY}: \"{stored or 'bf16'}\" in .*, \"{other}\" now"):
        RunFolder(changed).check_configuration()


def test_a_start_that_trained_nothing_decides_nothing(tmp_path: Path) -> None:
    folder = begun(auto_tree(Path("shards"), tmp_path / "run"), "fp32")
    (folder.path / "starts.jsonl").unlink()
    assert values_of_run(folder) == {}


def test_a_run_whose_configuration_is_lost_takes_the_value_of_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = begun(auto_tree(Path("shards"), tmp_path / "run"), "fp32")
    step = folder.path / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({}))
    (step / "config.yaml").write_text(folder.config_text)
    (folder.path / "config.yaml").unlink()
    assert values_of_run(folder)[KEY] == "fp32"
    copied = folder.path / "checkpoints" / "step-00000003"  # whose copying was broken off
    copied.mkdir()
    (copied / "manifest.json").write_text(json.dumps({}))
    assert values_of_run(folder)[KEY] == "fp32"
    for damage in ("training: [", "3", "\0"):
        (copied / "config.yaml").write_text(damage)
        assert values_of_run(folder)[KEY] == "fp32"
    (copied / "config.yaml").write_bytes(b"\xff\xfe")
    assert values_of_run(folder)[KEY] == "fp32"
    (step / "config.yaml").write_text("training: [")
    assert values_of_run(folder) == {}


def plan_of(tree: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """What `tritrain plan` prints as JSON and as a table."""
    file = folder / "planned.yaml"
    file.write_text(yaml.safe_dump(tree))
    as_json, table = (
        CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", str(file), "--ranks", "2", *more])
        for more in (["--json"], [])
    )
    assert as_json.exit_code == table.exit_code == 0, as_json.output + table.output
    told = json.loads(as_json.stdout)
    del told["plan"]["disk"]["free_bytes"]  # which others change
    return told, " ".join(table.stdout.replace("│", " ").split())


def test_a_plan_says_what_it_counts_auto_as(tmp_path: Path) -> None:
    tree = auto_tree(Path("shards"), tmp_path / "run")
    numbers = {}
    for dtype in ("bf16", "fp32"):
        told, table = plan_of(tree | {"training": tree["training"] | {"compute_dtype": dtype}}, tmp_path)
        assert told["plan"].pop("counted_as") == {}
        assert "counted as" not in table
        numbers[dtype] = told
    assert numbers["bf16"]["plan"]["bytes_per_rank"] != numbers["fp32"]["plan"]["bytes_per_rank"]

    told, table = plan_of(tree, tmp_path)
    assert told["plan"].pop("counted_as") == {KEY: "bf16, which a GPU computes in hardware"}
    assert f"{KEY}: auto counted as bf16, which a GPU computes in hardware" in table
    assert told == numbers["bf16"]

    begun(tree, "fp32")
    told, table = plan_of(tree, tmp_path)
    assert told["plan"].pop("counted_as") == {KEY: "fp32, as this run began"}
    assert f"{KEY}: auto counted as fp32, as this run began" in table
    assert told == numbers["fp32"]


def dtypes_measured_in(out: str, shards: str) -> list[str]:
    from launcher.formats.opened import Exportable
    from launcher.inference.sharded import compute_dtype_of

    automatic.has_bf16 = lambda: dist.get_rank() == 1  # type: ignore[assignment]
    ranks = Ranks(dist.get_rank(), 2, dist.get_rank(), torch.device("cpu"))
    found = []
    for dtype in ("auto", "bf16", "fp32"):
        config = tiny_config(Path(shards), Path(out), training={"compute_dtype": dtype})
        opened = Exportable(None, config.model, None, None, config, None)  # type: ignore[arg-type]
        found.append(str(compute_dtype_of(opened, ranks)))
    return found


def test_a_model_without_a_dtype_is_measured_in_that_of_the_first_rank(shards: Path, tmp_path: Path) -> None:
    expected = ["torch.float32", "torch.bfloat16", "torch.float32"]
    assert run_group(2, dtypes_measured_in, str(tmp_path), str(shards)) == [expected] * 2
