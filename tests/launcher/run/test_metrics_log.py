"""TensorBoard's files of a run: one curve for each figure, over all starts and versions."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from launcher.report.history import read_history
from launcher.run.metrics_log import HISTOGRAM_EDGES, MetricsLog


def start(run: Path, step: int) -> None:
    """Log one step, as a start of the run that goes on before it."""
    row = {"step": step, "tokens": step, "phase": 0, "precision": "16-bit"}
    log = MetricsLog(run, step=step - 1, phase=0, tensorboard=True)
    log.write(row | {"train/loss": 4.0 - step, "validation/loss": 3.0, "train/grad_norm": 1.0})
    log.close()


@pytest.mark.parametrize("is_old", [True, False])
def test_a_run_that_goes_on_keeps_its_tags(tmp_path: Path, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second are read by the number of the writer in its process, and 10 sorts before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    if is_old:
        with SummaryWriter(str(tmp_path / "tensorboard")) as old:
            old.add_text("configuration", "    run:", 0)
            old.add_scalar("train/loss", 3.0, 1)
            old.add_scalar("validation/loss", 3.0, 1)
            old.add_scalar("train/grad_norm", 1.0, 1)
    else:
        start(tmp_path, 1)
    start(tmp_path, 2)
    start(tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = ["train/loss", "validation/loss"] if is_old else ["1-loss/train", "1-loss/validation"]
    assert sorted(events.Tags()["scalars"]) == sorted([*losses, "train/grad_norm"])
    assert [(event.step, event.value) for event in events.Scalars(losses[0])] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_figures_of_layers_that_are_not_finite_are_null_and_in_no_histogram(tmp_path: Path) -> None:
    """As of a ternary phase whose gradients are not: TensorBoard makes no histogram of them, and JSON has no NaN."""
    head = {"step": 3, "tokens": 9, "phase": 1, "precision": "ternary"}
    layers = {"names": ["a", "b"], "scale": [0.5, math.inf], "grad_norm": [math.nan, math.nan]}
    shares = {key: [1.0] + [0.0] * (len(edges) - 2) for key, edges in HISTOGRAM_EDGES.items()}
    log = MetricsLog(tmp_path, step=0, phase=0, tensorboard=True)
    log.write(head | shares | {"quant/grad_norm": math.nan, "quant/scale": 0.5, "quant/layers": layers})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["quant/layers"] == {
        "names": ["a", "b"],
        "scale": [0.5, None],
        "grad_norm": [None, None],
    }
    assert "quant/grad_norm" not in json.loads(text)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["histograms"]) == sorted(["layers/scale", *HISTOGRAM_EDGES])
    (history,) = read_history(tmp_path / "metrics.jsonl", "run").grids
    assert history.values["scale"].tolist() == [[0.5, pytest.approx(math.nan, nan_ok=True)]]
