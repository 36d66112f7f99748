"""Traces of steps: of each phase, readable by others, and without effect on what is trained."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from ranks import run_group
from runs import run
from tiny import tiny_config

from launcher.config.transition import TransitionConfig
from launcher.errors import ConfigError
from launcher.plan.course import Phase
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.training.tracing import Tracer


def with_and_without(shards: str, out: str) -> None:
    for num_steps in (0, 2):
        phases = [{"precision": "16-bit", "steps": 5}, {"precision": "ternary", "steps": 1}]
        config = tiny_config(
            Path(shards), Path(out, str(num_steps)), phases=phases, logging={"profile_steps": num_steps}
        )
        assert run(config) == "complete"


@pytest.mark.slow
def test_steps_of_each_phase_are_traced(shards: Path, tmp_path: Path) -> None:
    run_group(2, with_and_without, str(shards), str(tmp_path))
    assert not (tmp_path / "0" / "profile").exists()
    names = sorted(path.name for path in (tmp_path / "2" / "profile").iterdir())
    assert names == [
        "16-bit-step-00000003.json.gz", "16-bit-step-00000003.txt",  # of steps 3 and 4, on the first rank
        "ternary-step-00000006.json.gz", "ternary-step-00000006.txt",  # all that the phase has
    ]  # fmt: skip
    events = json.loads(gzip.decompress((tmp_path / "2" / "profile" / names[0]).read_bytes()))["traceEvents"]
    updates = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(updates) == 2
    assert "aten::mm" in (tmp_path / "2" / "profile" / names[1]).read_text()
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("0", "2")]
    losses, traced = ([row["train/loss"] for row in each if "train/loss" in row] for each in rows)
    assert losses == traced
    assert len(losses) == 6


def stopped_within_a_trace(shards: str, out: str) -> None:
    phases = [{"precision": "16-bit", "steps": 9}]
    config = tiny_config(Path(shards), Path(out), phases=phases, logging={"profile_steps": 4})
    assert run(config, 4) == "interrupted"
    assert not torch.autograd._profiler_enabled()  # with one, the process crashes at its end


def test_a_run_that_stops_within_a_trace_writes_what_it_has(shards: Path, tmp_path: Path) -> None:
    run_group(1, stopped_within_a_trace, str(shards), str(tmp_path))
    trace = tmp_path / "profile" / "16-bit-step-00000003.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert len([event for event in events if event.get("name", "").startswith("Optimizer.step")]) == 2


def test_a_trace_ends_where_steps_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a smoke test leaves out all but the first and the last of a phase."""
    phase = Phase(index=0, precision="16-bit", start=0, end=20, quantization=None, transition=TransitionConfig())
    tracer = Tracer(tmp_path / "profile", Ranks(0, 1, 0, torch.device("cpu")), 3, Console(silent=False))
    for step in (0, 1, 2, 18, 19):
        with tracer.around(phase, step):
            assert torch.autograd._profiler_enabled() == (step == 2)
    assert "Traced steps 3 to 3" in capsys.readouterr().out


def test_a_negative_number_of_steps_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logging\.profile_steps: is -1; must be 0 or more"):
        tiny_config(shards, tmp_path, logging={"profile_steps": -1})
