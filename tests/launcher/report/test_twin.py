"""The excess of runs that began from a checkpoint over the run that the checkpoint is of."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import tritrain

from launcher.errors import ConfigError
from launcher.report.summary import summarize
from launcher.report.twin import excess_over, find_twin, named_excess

TOKENS = 1000


def falling(step: int) -> float:
    return 3 + 4 * (step + 10) ** -0.5


def above(step: int) -> float:
    return 0.05 + 0.2 * math.exp(-(step - 100) / 10)


def write_run(
    folder: Path,
    loss: Callable[[int], float],
    steps: range,
    *,
    precision: str,
    phase: int,
    **config: Any,
) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": folder.name}, **config}))
    rows: list[dict[str, Any]] = []
    for step in steps:
        head = {"tokens": step * TOKENS, "phase": phase, "precision": precision}
        rows.append({"step": step, **head, "train/loss": loss(step), "train/learning_rate": 1e-3})
    end = {"validation/loss": loss(steps[-1]) + 0.5, "validation/bits_per_byte": 1.0, "validation/when": "end of phase"}
    begin = {"step": steps[0] - 1, "tokens": (steps[0] - 1) * TOKENS, "phase": phase, "precision": precision}
    rows = [begin | end | {"validation/when": "start of phase"}, *rows, rows[-1] | end]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    data = {"shuffle_seed": 1, "workers": 2}
    return write_run(tmp_path / "trunk", falling, range(1, 301), precision="16-bit", phase=0, data=data)


def write_started(folder: Path, start: str, **sections: dict[str, Any]) -> Path:
    """Write a ternary run of steps 101 to 200 that started from a checkpoint, above the 16-bit run."""
    sections |= {"checkpoint": {"start_from": start}}
    steps = range(101, 201)
    return write_run(folder, lambda step: falling(step) + above(step), steps, precision="ternary", phase=1, **sections)


def test_a_started_run_is_compared_step_by_step_with_the_run_of_its_checkpoint(trunk: Path, tmp_path: Path) -> None:
    start = str(trunk / "checkpoints" / "step-00000100")
    run = write_started(tmp_path / "run", start, data={"shuffle_seed": 1, "workers": 0})
    assert find_twin(run) == trunk
    found = excess_over(summarize(run), trunk)
    assert found is not None
    assert (found.same_batches, found.offset_tokens) == (True, 0)
    assert found.peak == pytest.approx(above(101))
    assert found.area == pytest.approx(TOKENS * sum(map(above, range(101, 201))))
    assert found.at_end is None  # the twin was not evaluated there
    page = tmp_path / "page.html"
    tritrain("report", run, "--out", page)
    assert "Above the 16-bit twin, trunk" in page.read_text()
    assert f"+{above(101):.4f}" in page.read_text()


def test_tokens_before_a_converted_checkpoint_count(trunk: Path, tmp_path: Path) -> None:
    source = trunk / "checkpoints" / "step-00000100"
    source.mkdir(parents=True)
    (source / "manifest.json").write_text(json.dumps({"tokens": 100 * TOKENS}))
    run = write_run(
        tmp_path / "run", lambda step: falling(step + 100) + 0.1, range(1, 201), precision="ternary", phase=0
    )
    own = run / "checkpoints" / "step-00000200"
    own.mkdir(parents=True)
    (own / "manifest.json").write_text(json.dumps({"provenance": {"source": str(source)}}))
    assert find_twin(run) == trunk
    found = excess_over(summarize(run), trunk)
    assert found is not None
    assert (found.same_batches, found.offset_tokens) == (False, 100 * TOKENS)
    assert found.values == pytest.approx(0.1, abs=0.003)
    assert found.area == pytest.approx(0.1 * 200 * TOKENS, rel=0.03)
    assert found.at_end == pytest.approx(0.1)


def test_without_a_twin_there_is_no_excess_and_a_wrong_one_is_refused(trunk: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling, range(1, 51), precision="ternary", phase=0)
    assert find_twin(run) is None
    assert named_excess(summarize(run), trunk).same_batches is False  # its data are others
    other = write_run(tmp_path / "other", falling, range(1, 51), precision="ternary", phase=0)
    with pytest.raises(ConfigError, match=r"--twin .*other: has no logged 16-bit steps after the switch of run"):
        named_excess(summarize(run), other)
    with pytest.raises(ConfigError, match="--twin: needs a single run"):
        tritrain("report", run, other, "--twin", trunk, "--out", tmp_path / "page.html")
    checkpoint = trunk / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"--twin .*step-\d+: is a checkpoint of .*trunk; name the run"):
        named_excess(summarize(run), checkpoint)
    with pytest.raises(ConfigError, match=r"--twin .*nothing: "):
        tritrain("report", run, "--twin", tmp_path / "nothing", "--out", tmp_path / "page.html")


def test_a_run_that_began_from_averaged_weights_has_a_twin(trunk: Path, tmp_path: Path) -> None:
    run = write_started(tmp_path / "run", f"{trunk / 'checkpoints' / 'step-00000100'}@averaged")
    assert find_twin(run) == trunk
    found = excess_over(summarize(run), trunk)
    assert found is not None
    assert found.offset_tokens == 0


def test_the_end_is_not_compared_with_a_twin_that_is_ternary_by_then(tmp_path: Path) -> None:
    ends = {"dense": "16-bit", "switched": "ternary"}
    for name, precision in ends.items():
        twin = write_run(tmp_path / name, falling, range(1, 151), precision="16-bit", phase=0)
        later = write_run(tmp_path / f"{name}-later", falling, range(151, 201), precision=precision, phase=1)
        with (twin / "metrics.jsonl").open("a") as log:
            log.write((later / "metrics.jsonl").read_text())
    run = write_run(tmp_path / "run", lambda step: falling(step) + 0.2, range(101, 201), precision="ternary", phase=1)
    found = {name: excess_over(summarize(run), tmp_path / name) for name in ends}
    at_end = {name: excess.at_end for name, excess in found.items() if excess is not None}
    assert at_end == {"dense": pytest.approx(0.2), "switched": None}
