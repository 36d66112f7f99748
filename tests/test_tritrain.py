"""`import tritrain`: light to import, whole, and a run from Python as from the command."""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from places import ROOT
from tiny import tiny_tree

import tritrain
from launcher.run.metrics_log import MetricsLog, read_metrics
from launcher.watch.failure import missing_ranks

SOURCE = ast.parse((ROOT / "tritrain.py").read_text())


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import tritrain; print(*sys.modules.keys() - before)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in shown.stdout.split()} <= sys.stdlib_module_names | {"tritrain"}


def test_every_public_name_leads_to_what_checkers_see() -> None:
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    seen = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == tritrain._MODULES
    assert {*tritrain.__all__} == {*seen, "train", "__version__"}
    assert dir(tritrain) == sorted(tritrain.__all__)
    for name, module in seen.items():
        thing = getattr(tritrain, name)
        assert thing is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="has no attribute 'lode_model'"):
        tritrain.lode_model  # noqa: B018


def test_errors_of_users_are_one_family() -> None:
    family = [getattr(tritrain, name) for name in tritrain.__all__ if name.endswith("Error") and name != "DataError"]
    assert len(family) == 6
    assert all(issubclass(error, tritrain.UserError) for error in family)


def test_nothing_imports_it() -> None:
    """It composes the packages, as import-linter would hold it if it were a package."""
    for folder in ("launcher", "model", "data", "quant", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert "tritrain" not in names, path


def test_a_plain_model_is_quantized_and_frozen_with_torch_alone() -> None:
    config = tritrain.ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = tritrain.Transformer(config)
    tritrain.initialize_(model, 0)
    tritrain.quantize_(model, tritrain.PRESETS["bitnet-b1.58"])
    tritrain.set_strength_(model, 1.0)
    tokens_BT = torch.arange(16)[None] % 64
    expected = model(tokens_BT).logits
    tritrain.freeze_(model)
    assert torch.equal(model(tokens_BT).logits, expected)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    tree = tiny_tree(shards, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def test_a_run_is_trained_and_opened(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tritrain.train(config, "phases.1.steps=2", ranks=1)
    assert "ternary step 6/6" in capsys.readouterr().out.replace("  ", " ")
    assert run.path == config.parent / "run"
    assert run.status.state == "complete"
    assert run.config.phases[1].steps == 2
    assert [folder.name for folder in run.checkpoints] == ["step-00000004", "step-00000006"]

    history, rows = run.history(), read_metrics(run.path / "metrics.jsonl")
    assert history["step"].tolist() == [row["step"] for row in rows]
    assert history["precision"].tolist() == [row["precision"] for row in rows]
    steps, losses = history.curve("train/loss")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert losses.tolist() == [row["train/loss"] for row in rows if "train/loss" in row]
    frame = history.to_pandas()
    assert list(frame.columns) == list(history)
    assert len(frame) == history.num_rows == len(rows)
    assert np.array_equal(frame["train/loss"].to_numpy(), history["train/loss"], equal_nan=True)

    loaded = tritrain.load_model(run)
    assert isinstance("".join(loaded.generate("te", max_tokens=3)), str)
    too_long = ["te"] * 100
    for mistake, said in (
        (lambda: loaded.generate(" ".join(too_long)), r"the prompt has \d+ tokens, but the model's context is "),
        (lambda: loaded.generate_tokens([1], temperature=-1), "temperature -1, .* they must be"),
        (lambda: history.curve("train/los"), r"train/los: no such metric was logged; did you mean train/loss\?"),
        (lambda: history["tokns"], r"tokns: no such metric was logged; did you mean tokens\?"),
        (lambda: history.curve("precision"), "precision: is text, which has no curve"),
        (lambda: tritrain.load_model(run, dtype="fp32"), r"dtype is 'fp32'; must be torch.bfloat16, torch.float32 or"),
        (lambda: tritrain.load_model(run, dtype=torch.float16), r"dtype is torch.float16; must be torch.bfloat16"),
        (lambda: tritrain.load_model(run, device="gpu"), "device is 'gpu': "),
        (lambda: tritrain.load_model(run, device="cuda:99"), "device is 'cuda:99': "),
        (lambda: tritrain.load_model(run, device=None), "device is 'None': "),  # type: ignore[arg-type]
    ):
        with pytest.raises(tritrain.UserError, match=said):
            mistake()
    assert history.get("train/los") is None

    again = tritrain.train(config, "phases.1.steps=2", ranks=1)
    assert again == run
    assert capsys.readouterr().out == ""  # nothing was trained


@pytest.mark.parametrize(
    ("config", "overrides", "options", "said"),
    [
        (None, (), {}, "config is None; must be the path of a configuration file"),
        ({"run": {}}, (), {}, "config is {'run': {}}; must be the path"),
        ("config.yaml", (None,), {}, 'override None: must be text, "key.sub=value"'),
        ("config.yaml", ({"phases.0.steps": 2},), {}, "override {'phases.0.steps': 2}: must be text"),
        ("config.yaml", (), {"ranks": "2"}, "ranks is '2'; must be 1 or more, or None"),
        ("config.yaml", (), {"ranks": 0}, "ranks is 0; must be 1 or more, or None"),
        ("config.yaml", (), {"ranks": -1}, "ranks is -1; must be 1 or more, or None"),
    ],
)
def test_what_train_cannot_take_is_named(config: Any, overrides: Any, options: Any, said: str) -> None:
    with pytest.raises(tritrain.ConfigError, match=re.escape(said)):
        tritrain.train(config, *overrides, **options)


def test_a_history_keeps_both_rows_of_a_switch_when_the_run_is_resumed_there(tmp_path: Path) -> None:
    def row(step: int, phase: int, **values: float | str) -> dict[str, Any]:
        return {"step": step, "tokens": 0, "phase": phase, "precision": ("16-bit", "ternary")[phase], **values}

    def write(*rows: dict[str, Any]) -> None:
        log = MetricsLog(tmp_path, step=4 if (tmp_path / "metrics.jsonl").exists() else 0, phase=0, tensorboard=False)
        for each in rows:
            log.write(each)
        log.close()

    before = [row(4, 0, **{"train/loss": 4.0}), row(4, 0, **{"validation/when": "end of phase"})]
    start = row(4, 1, **{"validation/when": "start of phase"})
    (tmp_path / "state.json").write_text("{}")
    write(*before, start, row(5, 1, **{"train/loss": 3.0}), row(6, 1, **{"train/loss": 2.0}))
    write(start, row(5, 1, **{"train/loss": 3.5}))
    history = tritrain.open_run(tmp_path).history()
    assert history.curve("train/loss")[1].tolist() == [4.0, 3.5]
    assert history["step"].tolist() == [4, 4, 4, 5]
    assert history["phase"].tolist() == [0, 0, 1, 1]
    assert history["validation/when"].tolist()[1:3] == ["end of phase", "start of phase"]
    assert repr(history) == "<4 rows of step, tokens, phase, precision, train/loss, validation/when>"


def test_a_run_without_metrics_has_an_empty_history(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert dict(tritrain.open_run(tmp_path).history()) == {}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tritrain.ConfigError, match="no such folder"):
        tritrain.open_run(tmp_path / "absent")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    with pytest.raises(tritrain.ConfigError, match="holds some; name one of them"):
        tritrain.open_run(tmp_path)


def test_a_wrong_configuration_is_an_exception_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # no process is started
    with pytest.raises(tritrain.ConfigError, match=r"optimizer\.lerning_rate: unknown key"):
        tritrain.train(config, "optimizer.lerning_rate=1", ranks=1)
    with pytest.raises(tritrain.ConfigError, match="do not divide into micro-batches"):
        tritrain.train(config, ranks=3)
    with pytest.raises(tritrain.DataError, match=r"data\.sources\.0\.path: absent"):
        tritrain.train(config, "data.sources.0.path=absent", ranks=1)
    assert not (config.parent / "run").exists()


def test_output_that_is_not_utf_8_ends_no_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = r"import sys; sys.stderr.buffer.write(b'caf\xe9\n'); sys.exit(3)"
    monkeypatch.setattr("launcher.commands.train.ranks_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(tritrain.TrainingError, match="caf\ufffd"):
        tritrain.train(config, ranks=1)


@pytest.mark.slow
def test_a_failure_is_an_exception_with_the_message_that_the_run_left(config: Path) -> None:
    with pytest.raises(tritrain.TrainingError, match="/proc/absent"):
        tritrain.train(config, "checkpoint.folder=/proc/absent", ranks=1)
    assert not (config.parent / "run").exists()  # nothing is left of a first start that failed
    (config.parent / "run" / "submitted").mkdir(parents=True)
    with pytest.raises(tritrain.TrainingError, match="/proc/absent") as caught:
        tritrain.train(config, "checkpoint.folder=/proc/absent", ranks=1)
    assert "Traceback" not in str(caught.value)
    assert json.loads((config.parent / "run" / "state.json").read_text())["message"] == str(caught.value)
    with pytest.raises(tritrain.TrainingError) as again:
        tritrain.train(config, "checkpoint.folder=/proc/absent", ranks=1)
    assert str(again.value) == str(caught.value)


SCRIPT = """
import signal, sys, tritrain
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background may ignore it
try:
    tritrain.train(sys.argv[1], "phases.0.steps=400", ranks=int(sys.argv[2]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def training_at_step_3(config: Path, ranks: int) -> "subprocess.Popen[str]":
    """A process that trains from Python, and has logged its third step of 404."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", SCRIPT, str(config), str(ranks)],
        cwd=config.parent, text=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/404" in line:
            break
    return process


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_call_goes_on(config: Path) -> None:
    """As in a notebook, whose kernel alone gets the signal."""
    process = training_at_step_3(config, ranks=1)
    os.kill(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert "Stopped and saved" in shown
    assert shown.splitlines()[-1] == "interrupted"
    assert process.returncode == 0
    state = json.loads((config.parent / "run" / "state.json").read_text())
    assert state["status"] == "interrupted"

    (config.parent / "run" / "stop").touch()
    began = time.time()
    with pytest.raises(tritrain.TrainingError, match=r"was stopped \(stop file\) and has saved") as caught:
        tritrain.train(config, "phases.0.steps=400", ranks=1)
    assert str(tritrain.open_run(config.parent / "run").checkpoints[-1]) in str(caught.value)
    assert (config.parent / "run" / "state.json").stat().st_mtime > began


@pytest.mark.slow
def test_a_second_interrupt_kills_ranks_that_hang(config: Path) -> None:
    process = training_at_step_3(config, ranks=2)
    folder = config.parent / "run" / "ranks"
    pids = [int((folder / f"rank-{rank:05d}").read_text().split()[1]) for rank in range(2)]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(status_of(pid)["State"].startswith("T") for pid in pids))
        os.kill(process.pid, signal.SIGINT)
        # Passed on, to ranks that cannot take it.
        wait_until(lambda: any(int(status_of(pid)["ShdPnd"], 16) for pid in pids))
        os.kill(process.pid, signal.SIGINT)
        shown, _ = process.communicate(timeout=120)
        assert shown.splitlines()[-1] == "interrupted"
        assert missing_ranks(folder) == [0, 1]
    finally:
        for pid in (*pids, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
