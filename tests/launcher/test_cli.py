"""The `tritrain` command as a person uses it: real processes, real signals."""

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from places import ROOT
from ranks import run_ranks
from tiny import tiny_tree, write_corpus
from typer.testing import CliRunner

from launcher.checkpoint.reader import CheckpointReader
from launcher.process.torchrun import kept_port
from launcher.run.metrics_log import read_metrics

TRITRAIN = [str(Path(sys.executable).with_name("tritrain"))]
PRETRAIN = str(ROOT / "launcher" / "pretrain.py")
STARTS = {
    "tritrain": [*TRITRAIN, "train", "config.yaml", "--ranks", "2"],
    "deepspeed": [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(kept_port()),
        PRETRAIN, "--config", "config.yaml", "engine.name=deepspeed", "engine.zero_stage=3",
    ],
    "torchrun": [
        str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", PRETRAIN,
        "--config", "config.yaml",
    ],
    "python": [sys.executable, PRETRAIN, "--config", "config.yaml"],
}  # fmt: skip
BY_DEEPSPEED = ["--with", "deepspeed", "engine.name=deepspeed", "engine.zero_stage=3"]
SHORT = ["phases.0.steps=2", "phases.1.steps=2", "schedule.warmup_steps=1"]


@pytest.fixture
def folder(tmp_path: Path, shards: Path) -> Path:
    """A folder with a configuration, of data that are prepared."""
    tree = tiny_tree(shards, tmp_path / "run")
    tree["phases"] = [{"precision": "16-bit", "steps": 30}, {"precision": "ternary", "steps": 30}]
    tree["logging"] = {"interval_steps": 1}
    tree["evaluation"] = {"sample_prompts": ["a"], "sample_tokens": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def let_it_prepare(folder: Path) -> None:
    """Have the run prepare its own data, as the quickstart does."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    corpus = write_corpus(folder / "corpus.jsonl")
    tree["data"]["sources"] = [{"path": str(folder / "shards")}]
    tree["data"]["prepare"] = {"inputs": [str(corpus)], "tokenizer": "bpe:320", "validation_fraction": 0.1}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """Whatever a test started is gone when it ends, however it ends."""
    yield
    for process in STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    STARTED.clear()


def start(folder: Path, command: list[str]) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    STARTED.append(process)
    return process


def finish(folder: Path, command: list[str]) -> tuple[int, str]:
    process = start(folder, command)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> str:
    """Read the output until the run has logged a step."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if f"step {step}/60" in line:
            return seen
    raise AssertionError(seen)


@pytest.mark.slow
def test_a_run_is_stopped_goes_on_and_shows_what_it_does_until_it_is_complete(folder: Path) -> None:
    let_it_prepare(folder)
    run = folder / "run"
    process = start(folder, STARTS["tritrain"])
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)  # as a scheduler does: to the one it started
    check_stopped(process, run)

    code, output = finish(folder, STARTS["tritrain"])
    assert code == 0, output
    assert "Resuming tiny after step" in output
    assert "step 60/60" in output
    assert "left" in output
    assert "bits per byte of held-out text" in output
    assert "From the finished model:" in output
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((run / "state.json").read_text())["status"] == "complete"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 61))  # every step once
    numbers = {key for row in rows for key, value in row.items() if "/" in key and isinstance(value, int | float)}
    losses = {"train/loss", "validation/loss", "validation/bits_per_byte"}
    assert {tag for tag in scalars(run / "tensorboard") if tag in numbers} == numbers - losses
    assert [tag for tag in sorted(scalars(run / "tensorboard")) if tag not in numbers] == [
        "1-loss/train",
        "1-loss/validation",
        "1-loss/validation_bits_per_byte",
    ]
    assert min(scalars(run / "tensorboard")) == "1-loss/train"
    assert texts(run / "tensorboard") == {"configuration/text_summary", "sample/1/text_summary"}

    code, output = finish(folder, STARTS["tritrain"])
    assert code == 0
    assert "is complete" in output
    assert "tritrain report" in output
    assert len(read_metrics(run / "metrics.jsonl")) == len(rows)  # nothing was trained

    code, output = finish(folder, [*STARTS["tritrain"], "model.num_layers=1"])
    assert code == 2
    assert "model.num_layers: 2 in" in output


def check_stopped(process: "subprocess.Popen[str]", run: Path) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3, output
    assert "Stopped and saved" in output
    assert "Traceback" not in output
    assert json.loads((run / "state.json").read_text())["status"] == "interrupted"


def tags(folder: Path) -> dict[str, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()


def scalars(folder: Path) -> set[str]:
    return set(tags(folder)["scalars"])


def texts(folder: Path) -> set[str]:
    return {tag for tag in tags(folder)["tensors"] if tag.endswith("text_summary")}


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Path) -> None:
    process = start(folder, STARTS["tritrain"])
    wait_for_step(process, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    check_stopped(process, folder / "run")
    code, output = finish(folder, STARTS["tritrain"])
    assert code == 0, output
    assert "Resuming tiny after step" in output
    counts = Counter(row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row)
    assert counts == Counter(range(1, 61))  # every step once


def start_in_terminal(folder: Path, command: list[str]) -> tuple["subprocess.Popen[str]", int]:
    """Start a command as the leader of a terminal's session; returns its process and the terminal."""
    terminal, its_end = pty.openpty()
    # Where tests run under nohup, SIGHUP is ignored. No `pty.fork`: a fork of a process with threads may deadlock.
    process = subprocess.Popen(
        ["setsid", "--ctty", "env", "--default-signal=HUP", *command], cwd=folder, text=True,
        stdin=its_end, stdout=its_end, stderr=its_end, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    STARTED.append(process)
    os.close(its_end)
    return process, terminal


def wait_for_rows(metrics: Path, number: int, terminal: int) -> None:
    """Read what a run prints on its terminal until it has logged that many rows."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["tritrain", "python"])
def test_a_run_whose_terminal_is_closed_saves_and_says_so_in_its_folder(folder: Path, launcher: str) -> None:
    process, terminal = start_in_terminal(folder, STARTS[launcher])
    run = folder / "run"
    wait_for_rows(run / "metrics.jsonl", 3, terminal)
    os.close(terminal)
    assert process.wait(120) == 3
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "signal")
    assert CheckpointReader(Path(state["checkpoint"])).manifest.step == read_metrics(run / "metrics.jsonl")[-1]["step"]


@pytest.mark.slow  # test_watching.py and test_supervisor.py see the same of the ranks, and of what starts them
@pytest.mark.parametrize("launcher", ["tritrain", "deepspeed"])
def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(folder: Path, launcher: str) -> None:
    process = start(folder, STARTS[launcher])
    wait_for_step(process, 2)
    pid = int((folder / "run" / "ranks" / "rank-00001").read_text().split()[1])
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode not in (0, 3), output
    assert f"rank 1 (process {pid}" in output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["tritrain", "deepspeed"])
def test_ranks_whose_launcher_is_killed_save_and_end(folder: Path, launcher: str) -> None:
    process = start(folder, [*STARTS["tritrain"], *(BY_DEEPSPEED if launcher == "deepspeed" else [])])
    wait_for_step(process, 2)
    pids = [int((folder / "run" / "ranks" / f"rank-0000{rank}").read_text().split()[1]) for rank in range(2)]
    process.kill()
    output, _ = process.communicate(timeout=60)  # the ranks hold the other end
    named = f"The launcher (process {process.pid} on {socket.gethostname()}) was killed"
    assert f"{named}; its ranks save and end." in output
    assert "Stopped and saved (launcher lost)" in output
    state = json.loads((folder / "run" / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "launcher lost")
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python"])
def test_every_way_to_start_trains(folder: Path, launcher: str) -> None:
    code, output = finish(folder, [*STARTS[launcher], *SHORT])
    assert code == 0, output
    assert "ternary step 4/4" in output
    assert (folder / "run" / "report.html").exists()


def started_as_by_deepspeed(rank: int, world_size: int, folder: str) -> int:
    """What DeepSpeed's launcher runs as a rank, with its arguments."""
    from launcher.pretrain import main

    os.chdir(folder)
    arguments = STARTS["deepspeed"][STARTS["deepspeed"].index(PRETRAIN) + 1 :]
    return main([f"--local_rank={rank}", *arguments, *SHORT])


def test_a_rank_of_deepspeeds_launcher_trains(folder: Path) -> None:
    assert run_ranks(1, started_as_by_deepspeed, str(folder)) == [0]
    assert json.loads((folder / "run" / "state.json").read_text())["status"] == "complete"
    assert (folder / "run" / "report.html").exists()


@pytest.mark.slow
def test_two_runs_by_deepspeed_train_at_once(folder: Path) -> None:
    command = [*STARTS["tritrain"], *BY_DEEPSPEED, *SHORT]
    processes = [start(folder, [*command, f"run.folder={folder / name}"]) for name in ("one", "two")]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert "ternary step 4/4" in output


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_nothing_of_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONWARNINGS")
    code, output = finish(folder, [*TRITRAIN, "train", "config.yaml", "--ranks", "1", "optimizer.learning_rate=1e30"])
    assert code == 1
    assert "5 steps in a row, up to step 6, had a loss or gradient that is not finite" in output
    assert "shared_memory" not in output


def test_plan_trains_nothing(folder: Path) -> None:
    code, output = finish(folder, [*TRITRAIN, "plan", "config.yaml", "--ranks", "2", "--json"])
    assert code == 0
    numbers = json.loads(output)["plan"]
    assert numbers["total_steps"] == 60
    assert numbers["tokens_per_step"] == 8 * 32
    assert not (folder / "run").exists()


def test_what_is_wrong_with_a_configuration_comes_without_a_traceback(folder: Path) -> None:
    code, output = finish(folder, [*STARTS["tritrain"], "optimizer.lerning_rate=1", "checkpoint.interval_steps=0"])
    assert code == 2
    assert "optimizer.lerning_rate: unknown key; did you mean learning_rate?" in output
    assert "checkpoint.interval_steps: is 0" in output
    assert "Traceback" not in output


MEET = """
from launcher.process.ranks import max_over_ranks, process_group
with process_group(60) as ranks:
    assert max_over_ranks([ranks.rank], ranks) == [1]
"""


@pytest.mark.slow
def test_ranks_meet_on_a_machine_whose_name_leads_nowhere(tmp_path: Path) -> None:
    """As in a container without an entry for itself in /etc/hosts."""
    namespace = ["unshare", "--user", "--map-root-user", "--uts"]
    if subprocess.run([*namespace, "hostname", "leads-nowhere"], capture_output=True).returncode:
        pytest.skip("needs `unshare` and the right to give a namespace its own host name")
    (tmp_path / "meet.py").write_text(MEET)
    launch = f"hostname leads-nowhere; exec {sys.executable} -m launcher.process.supervisor 2 {tmp_path}/meet.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*namespace, "sh", "-c", launch], check=True, timeout=100, env=environment)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_meet(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    torchrun = STARTS["torchrun"][: STARTS["torchrun"].index(PRETRAIN)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, tmp_path / "meet.py"], check=True, timeout=100, env=environment)


def words(text: str) -> str:
    """What a box of rich says, without its lines and line breaks."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        ("train C", "--with", "torchrun deepspeed"),
        ("submit C", "--with", "torchrun srun deepspeed"),
        ("convert S --to R", "--format", "run universal hf"),
        ("convert S --to R", "--optimizer", "keep reset keep-variance rescale"),
        ("convert S --to R", "--dtype", "bf16 fp32"),
        ("export C --to P --format hf", "--format", "hf hf-ternary compressed-tensors mlx onnx gguf"),
        ("export C --to P --format hf", "--weights", "latent dequantized"),
        ("export C --to P --format hf", "--dtype", "bf16 fp32"),
        ("export C --to P --format hf", "--linear-class", "bitlinear autobitlinear"),
        ("export C --to P --format hf", "--for", "gpu x86 phone"),
        ("export C --to P --format hf", "--activations", "int8 none"),
        ("export C --to P --format hf", "--type", "tq2_0 q2_0 tq1_0 q8_0 f16"),
        ("export C --to P --format hf", "--embeddings", "q8_0 f16"),
        ("generate M P", "--dtype", "bf16 fp32"),
        ("generate M P", "--with", "tritrain llama.cpp"),
        ("chat M", "--with", "tritrain llama.cpp"),
    ],
)
def test_choices_are_listed_in_the_help_and_others_refused(command: str, option: str, choices: str) -> None:
    from launcher.cli import app

    name, *arguments = command.split()
    environment = {"COLUMNS": "160", "NO_COLOR": "1"}
    shown = CliRunner().invoke(app, [name, "--help"], env=environment).output
    assert "|".join(choices.split()) in next(line for line in shown.splitlines() if f" {option} " in line)
    refused = CliRunner().invoke(app, [name, *arguments, option, "nothing"], env=environment)
    assert refused.exit_code == 2
    said = words(refused.output)
    assert f"Invalid value for '{option}'" in said
    assert "'nothing' is not one of " + ", ".join(map(repr, choices.split())) in said


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    from launcher.cli import app

    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"tritrain {version('tritrain')}\n")
