"""A smoke test trains the first and last steps of each phase, and leaves nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from minimal import tree
from ranks import run_group, run_ranks
from tiny import tiny_config, tiny_tree

from launcher.config.file import parse_config
from launcher.errors import ConfigError
from launcher.plan.course import make_course
from launcher.process.ranks import ALONE
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.run.smoke import check_smoke, clear_smoke, smoke_config
from launcher.watch.failure import resume_advice


@pytest.mark.parametrize(
    ("smoke_steps", "expected"),
    [
        (1, [0, 100]),
        (2, [0, 99, 100, 199]),
        (5, [0, 1, 2, 98, 99, 100, 101, 102, 198, 199]),
        (100, list(range(200))),
        (1000, list(range(200))),
        (None, list(range(200))),
    ],
)
def test_a_smoke_test_takes_the_first_and_last_steps_of_each_phase(smoke_steps: Any, expected: list[int]) -> None:
    config = parse_config(tree("phases.0.steps=100", "phases.1.steps=100", "schedule.warmup_steps=0"))
    course = make_course(config)
    course = type(course)(**vars(course) | {"smoke_steps": smoke_steps})
    steps, done = [], 0
    while done < course.total_steps:
        steps.append(done)
        done = course.steps_after(done)
    assert steps == expected
    assert done == 200


def test_it_has_a_folder_of_its_own_and_removes_no_other(tmp_path: Path) -> None:
    config = parse_config(
        tree(f"run.folder={tmp_path}/run", "checkpoint.folder=s3://bucket/run", "logging.trackers=[wandb]")
    )
    smoke = smoke_config(config)
    assert (config.logging.trackers, smoke.logging.trackers) == (("wandb",), ())
    assert (smoke.run.path, smoke.checkpoints) == (tmp_path / "run-smoke", f"{tmp_path}/run-smoke/checkpoints")
    (tmp_path / "run-smoke").mkdir()
    (tmp_path / "run-smoke" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is in the way of a smoke test"):
        check_smoke(smoke.run.path)
    (tmp_path / "run-smoke" / "thesis.tex").unlink()
    for left in ("file", "folder/file"):
        check_smoke(smoke.run.path)
        clear_smoke(smoke.run.path)
        assert [path.name for path in smoke.run.path.iterdir()] == ["smoke"]
        (smoke.run.path / left).parent.mkdir(exist_ok=True)
        (smoke.run.path / left).touch()


def second_smoke_test(shards: str, out: str) -> tuple[str | None, list[str]]:
    """What a smoke test says while another one trains; what is in the folder then, and once the other has ended."""
    import launcher.pretrain

    folder = RunFolder(smoke_config(tiny_config(Path(shards), Path(out))))
    (folder.path / "checkpoints").mkdir(parents=True)
    (folder.path / "smoke").touch()
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); input()"
    arguments = [sys.executable, "-uc", code, str(folder.path / "lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()
        refusal = launcher.pretrain.claim(folder, ALONE, is_smoke=True)
        there = sorted(path.name for path in folder.path.iterdir())
        first.communicate("\n")
    assert launcher.pretrain.claim(folder, ALONE, is_smoke=True) is None
    return refusal, [*there, *sorted(path.name for path in folder.path.iterdir())]


def test_a_second_one_leaves_the_first_alone(tmp_path: Path) -> None:
    [[refusal, there]] = run_group(1, second_smoke_test, "shards", str(tmp_path / "run"))
    assert "another job trains here" in refusal
    assert there == ["checkpoints", "lock", "smoke", "lock", "smoke", "state.json"]


def test_what_nfs_keeps_of_removed_files_is_in_no_ones_way(tmp_path: Path) -> None:
    check_smoke(tmp_path)
    (tmp_path / ".nfs0000000000a3").touch()
    check_smoke(tmp_path)
    clear_smoke(tmp_path)
    check_smoke(tmp_path)


def test_one_that_was_stopped_begins_again(tmp_path: Path) -> None:
    folder = RunFolder(smoke_config(tiny_config(Path("shards"), tmp_path / "run")))
    (folder.checkpoints / "step-00000004").mkdir(parents=True)
    (folder.checkpoints / "step-00000004" / "manifest.json").touch()
    assert resume_advice(folder).startswith("The same command resumes from")
    (folder.path / "smoke").touch()
    assert resume_advice(folder) == "The same command begins the smoke test again."


def smoke(rank: int, world_size: int, file: str) -> tuple[int, list[tuple[int, int]]]:
    import shutil

    import launcher.pretrain

    rows: list[tuple[int, int]] = []

    def keep_rows(folder: Path, **options: Any) -> None:
        logged = read_metrics(Path(folder) / "metrics.jsonl")
        rows.extend((row["step"], row["phase"]) for row in logged if "train/loss" in row)
        rmtree(folder, **options)

    rmtree, shutil.rmtree = shutil.rmtree, keep_rows  # type: ignore[assignment]
    return launcher.pretrain.main(["--config", file, "--stop-after-steps", "2"]), rows


def test_it_crosses_the_switch_and_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    config = tiny_tree(shards, tmp_path / "run")
    config["phases"] = [{"precision": "16-bit", "steps": 50}, {"precision": "ternary", "steps": 50}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    [(code, rows)] = run_ranks(1, smoke, str(tmp_path / "config.yaml"))
    assert code == 0
    assert rows == [(49, 0), (50, 0), (99, 1), (100, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
