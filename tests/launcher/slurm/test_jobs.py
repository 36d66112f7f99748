"""Jobs on a real Slurm of three nodes: whatever ends them, the run goes on by itself and ends as the uninterrupted one.

Each job trains on two of the nodes, one rank each, from a copy of the code that takes its time for each step.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import assert_equal_runs, job_tree, logged_step, uninterrupted
from places import ROOT
from slurm import Slurm, missing_part, slurm_cluster

import launcher.slurm.submit
from launcher.config.file import parse_config
from launcher.run.requeue import read_lines, read_state
from launcher.slurm.cluster import SiteConfig
from launcher.slurm.submit import PACKAGES, Request, submit

TEMPLATES = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing_part() is not None, reason=str(missing_part()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3) as slurm:
        yield slurm


@pytest.fixture
def code(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, submitted from; steps take TEST_STEP_SECONDS, and nothing is shown at the end."""
    copy = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    train = copy / "launcher" / "train.py"
    step = "    at.step = run.plan.steps_after(at.step)\n"
    assert train.read_text().count(step) == 1
    slow = f'{step}    __import__("time").sleep(float(__import__("os").environ["TEST_STEP_SECONDS"]))\n'
    train.write_text(train.read_text().replace(step, slow))
    (copy / "launcher" / "report" / "ending.py").write_text("def show_ending(folder, console): pass\n")
    monkeypatch.setattr(launcher.slurm.submit, "ROOT", copy)
    monkeypatch.chdir(copy)
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TEST_STEP_SECONDS", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A folder of the checkout that runs, and what only the forked ranks of other tests need: not for jobs.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return copy


def submit_run(tree: dict[str, Any], launcher: str = "srun", time: str | None = None) -> str:
    request = Request(nodes=2, ranks_per_node=1, gpus_per_node=1, launcher=launcher, time=time)
    return submit(parse_config(tree), SiteConfig(sbatch_options=("--exclusive",)), request)[0]


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.glob("submitted/*/*.log")))


def wait_for_step(cluster: Slurm, job: str, run: Path, step: int, starts: int = 1) -> None:
    """Wait until the run has come so far, in its start of this number."""
    deadline = time.monotonic() + 200
    while len(read_lines(run / "starts.jsonl")) < starts or logged_step(run) < step:
        assert time.monotonic() < deadline, f"{cluster.job(job, 'JobState')}\n{log_of(run)}"
        time.sleep(0.1)


def assert_went_on(cluster: Slurm, job: str, run: Path, shards: Path, starts: int = 2) -> None:
    """The job has completed after so many starts, of which all but the first went on from a checkpoint."""
    assert cluster.wait(job, 300) == "COMPLETED", log_of(run)
    begun = read_lines(run / "starts.jsonl")
    assert len(begun) == starts, log_of(run)
    assert all(before["step"] < after["step"] for before, after in itertools.pairwise(begun))
    assert {line["job"] for line in begun} == {job}
    assert read_state(run) == {"status": "complete", "steps": 12}
    assert_equal_runs(run, uninterrupted(shards))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_template_is_one_that_slurm_takes(cluster: Slurm, template: Path) -> None:
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", template], check=True)
    done = subprocess.run(
        ["sbatch", "--test-only", template], env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    assert "to start at" in done.stderr, done.stderr


def test_there_are_templates() -> None:
    assert len(TEMPLATES) == 9


def test_path_that_slurm_has_to_unquote(cluster: Slurm, code: Path, tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "#1 $(touch CANARY)"
    job = submit_run(job_tree(tmp_path / "none", run))
    assert cluster.job(job, "JobName") == "tritrain-tiny"
    log = cluster.call("scontrol", "show", "job", job).partition("StdOut=")[2].splitlines()[0]
    assert Path(log).parent.parent.parent == run
    cluster.call("scancel", job)
    assert not list(tmp_path.rglob("CANARY"))


@pytest.mark.parametrize("how", ["torchrun", "deepspeed"])
def test_a_job_trains_what_was_submitted(cluster: Slurm, code: Path, shards: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    job = submit_run(job_tree(shards, run), launcher=how)
    for path in code.rglob("*.py"):
        path.write_text("raise SystemExit('edited since')\n")
    assert_went_on(cluster, job, run, shards, starts=1)
    assert {line["world_size"] for line in read_lines(run / "starts.jsonl")} == {2}


def test_a_job_that_an_administrator_requeues(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "0.5")
    job = submit_run(job_tree(shards, run), launcher="torchrun")
    wait_for_step(cluster, job, run, 3)
    cluster.call("scontrol", "requeue", job)
    assert_went_on(cluster, job, run, shards)


def test_a_job_that_one_of_higher_priority_preempts(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "0.5")
    job = submit_run(job_tree(shards, run))
    wait_for_step(cluster, job, run, 3)
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 2", "--output=/dev/null"
    )
    assert cluster.wait(urgent) == "COMPLETED"
    assert_went_on(cluster, job, run, shards)
    assert [line["idle_starts"] for line in read_lines(run / "requeues.jsonl")] == [0]


def test_a_job_whose_time_ends(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "3")
    tree = job_tree(shards, run)
    tree["run"]["stop_before_end_seconds"] = 25
    job = submit_run(tree, time="1")
    wait_for_step(cluster, job, run, 1)
    deadline = time.monotonic() + 120
    while not read_lines(run / "requeues.jsonl"):
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.2)
    assert read_state(run)["reason"] == "time limit"
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert_went_on(cluster, job, run, shards)


def test_a_node_that_dies(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "0.5")
    job = submit_run(job_tree(shards, run))
    wait_for_step(cluster, job, run, 3)
    node = cluster.node_of_rank(run, 1)
    cluster.kill_node(node)
    try:
        assert_went_on(cluster, job, run, shards)
    finally:
        cluster.start_node(node)


def test_a_person_saves_and_stops(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "1.2")
    tree = job_tree(shards, run, checkpoint={"interval_steps": None, "keep_last": 0})
    job = submit_run(tree)
    wait_for_step(cluster, job, run, 1)
    (run / "save").touch()
    deadline = time.monotonic() + 30
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (run / "save").exists()
    (run / "stop").touch()
    assert cluster.wait(job) == "COMPLETED", log_of(run)
    state = read_state(run)
    assert (state["status"], state["reason"]) == ("interrupted", "stop file")
    assert not (run / "stop").exists()
    assert cluster.job(job, "Restarts") == "0"
    assert "done: a person stopped the run" in log_of(run)


def test_a_cancelled_job_stays_cancelled(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TEST_STEP_SECONDS", "0.5")
    job = submit_run(job_tree(shards, run))
    wait_for_step(cluster, job, run, 1)
    cluster.call("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    assert read_state(run)["status"] == "interrupted"  # it had the time to save
    assert not (run / "requeues.jsonl").exists()


def test_starts_that_get_nowhere_are_not_repeated_for_ever(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path
) -> None:
    (code / "launcher" / "pretrain.py").write_text("raise SystemExit('a GPU is broken')\n")
    run = tmp_path / "run"
    job = submit_run(job_tree(shards, run))
    assert cluster.wait(job, 200) == "FAILED"
    assert cluster.job(job, "Restarts") == "2"
    state = read_state(run)
    assert state["status"] == "failed"
    assert state["message"].startswith("3 starts in a row ended with no checkpoint after step 0; not queued again")


def test_a_refused_configuration_is_not_repeated(cluster: Slurm, code: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = job_tree(shards, run)
    job = cluster.call("sbatch", "--parsable", "--nodes=3", "--exclusive", "--wrap=sleep 3", "--output=/dev/null")
    job = submit_run(tree)
    tree["optimizer"]["learning_rate"] = 1e-4
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(tree | {"tritrain_version": "0"}))
    (run / "starts.jsonl").touch()
    assert cluster.wait(job) == "FAILED"
    assert cluster.job(job, "Restarts") == "0"
    assert "failed: the configuration was refused" in log_of(run)
    assert "optimizer.learning_rate" in log_of(run)


def test_a_chain_of_short_jobs(
    cluster: Slurm, code: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    tree = job_tree(shards, run)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    template = tmp_path / "chain.sbatch"
    text = (ROOT / "launcher/slurm/array-chain.sbatch").read_text()
    text = text.replace("--gpus-per-node=8 --cpus-per-task=96 --mem=0", "--exclusive").replace("node=8", "node=1")
    template.write_text(text.replace("export SRUN_CPUS_PER_TASK", "# ").replace("--array=1-10%1", "--array=1-3%1"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TEST_STEP_SECONDS", "0.5")
    array = cluster.call_here("sbatch", "--parsable", str(template), str(tmp_path / "config.yaml"), str(run))
    wait_for_step(cluster, array, run, 3)
    [first_rank] = re.findall(r"process (\d+) on", (run / "lock").read_text())
    os.kill(int(first_rank), signal.SIGUSR2)  # as the end of its time would
    deadline = time.monotonic() + 200
    while cluster.call("squeue", "-h", "-j", array, check=False):
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.5)
    starts = read_lines(run / "starts.jsonl")
    assert [line["job"] for line in starts] == [f"{array}_1", f"{array}_2"]  # the third had nothing to do
    assert json.loads((run / "state.json").read_text()) == {"status": "complete", "steps": 12}
    assert_equal_runs(run, uninterrupted(shards))
