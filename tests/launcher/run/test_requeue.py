"""Whether a job is queued again."""

import json
import subprocess
import sys
from pathlib import Path

from places import ROOT
from slurm_stand_ins import checkpoint
from tiny import tiny_config

from launcher.run import requeue
from launcher.run.folder import RunFolder


def start(run: Path, step: int, job: str) -> None:
    run.mkdir(exist_ok=True)
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "step": step, "world_size": 2, "host": "a", "job": job}) + "\n")


def ask(run: Path, job: str | None = "17", refused: Path | None = None, steps: int | None = None) -> tuple[int, str]:
    return requeue.verdict(run, str(run / "checkpoints"), refused, job, steps)


def test_requeue_ends_with_the_run_or_by_a_person(tmp_path: Path) -> None:
    stopped = {"status": "interrupted", "checkpoint": "x/step-00000003"}
    for number, (state, code) in enumerate(
        (
            ({"status": "complete"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "17"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "17_2"}, requeue.DONE),
            (stopped | {"reason": "stop file", "job": "16"}, requeue.AGAIN),  # this job has not come to claim the run
            (stopped | {"reason": "stop file", "job": None}, requeue.AGAIN),
            (stopped | {"reason": "signal", "job": "17"}, requeue.AGAIN),
            (stopped | {"reason": "time limit", "job": "17"}, requeue.AGAIN),
            ({"status": "running"}, requeue.AGAIN),
        )
    ):
        run = tmp_path / str(number)
        run.mkdir()
        requeue.write_state(run, state)
        assert ask(run)[0] == code, state
    assert ask(tmp_path / "3", job=None)[0] == requeue.DONE  # asked outside of any job
    (tmp_path / "refused").write_text("engine.zero_stage: no")
    assert ask(run, refused=tmp_path / "refused") == (
        requeue.FAILED,
        "the configuration was refused: engine.zero_stage: no",
    )


def test_a_run_that_was_made_longer_is_not_complete(tmp_path: Path) -> None:
    requeue.write_state(tmp_path, {"status": "complete", "steps": 100})
    assert ask(tmp_path, steps=100)[0] == requeue.DONE
    assert ask(tmp_path, steps=200)[0] == requeue.AGAIN


def test_requeue_ends_when_starts_get_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    checkpoint(run, 4)
    assert ask(run)[0] == requeue.AGAIN  # it came from 0 to 4
    for _ in range(2):
        start(run, 4, "17")
        requeue.write_state(run, {"status": "failed", "message": "rank 1: out of memory"})
        assert ask(run)[0] == requeue.AGAIN
    checkpoint(run, 5)
    assert ask(run)[0] == requeue.AGAIN  # progress
    assert ask(run)[0] == requeue.AGAIN  # starts that never come to training count as well
    assert ask(run)[0] == requeue.AGAIN
    code, reason = ask(run)
    assert code == requeue.FAILED
    assert reason.startswith("3 starts in a row ended with no checkpoint after step 5; not queued again")
    assert "out of memory" in reason
    assert requeue.read_state(run) == {"status": "failed", "message": reason}
    assert ask(run, job="18")[0] == requeue.AGAIN  # submitted anew, it is tried anew


def test_a_line_that_a_full_disk_cut_off_keeps_nothing_from_going_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    for name in ("starts.jsonl", "requeues.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"time": 0.0, "step": 3, "jo')
    RunFolder(tiny_config(tmp_path, run)).note_start(4, 2)
    checkpoint(run, 4)
    assert ask(run)[0] == requeue.AGAIN
    assert [line["step"] for line in requeue.read_lines(run / "starts.jsonl")] == [0, 4]
    assert [line["idle_starts"] for line in requeue.read_lines(run / "requeues.jsonl")] == [0]


def test_checkpoints_in_another_folder_count_as_progress(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(6):
        start(run, 100 * number, "17")
        assert ask(run)[0] == requeue.AGAIN
    assert [ask(run)[0] for _ in range(3)] == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]


def test_what_more_is_known_of_a_reference_counts_as_progress(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "reference").mkdir(parents=True)
    for number in range(6):
        (run / "reference" / "phase-0.safetensors").write_bytes(bytes(number))
        requeue.write_state(run, {"status": "interrupted", "reason": "signal", "checkpoint": None})
        assert ask(run)[0] == requeue.AGAIN
    assert [ask(run)[0] for _ in range(3)] == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]


def test_going_back_to_a_switch_is_no_start_that_gets_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (0, 150, 100, 120, 130, 140):
        start(run, step, "17")
        assert requeue.verdict(run, "s3://bucket/run", None, "17")[0] == requeue.AGAIN
    assert [line["idle_starts"] for line in requeue.read_lines(run / "requeues.jsonl")] == [1, 0, 0, 0, 0, 0]


def test_a_job_whose_state_was_damaged_is_queued_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    (run / "state.json").write_text("")
    assert ask(run)[0] == requeue.AGAIN


def hold(run: Path) -> subprocess.Popen[str]:
    """Another job in a run's folder."""
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(1); input()"
    command = [sys.executable, "-c", code, str(run / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_progress_of_another_job_in_the_folder_is_none_of_ours(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "16")
    requeue.write_state(run, {"status": "running"})
    (run / "lock").write_text("process 7 on node1, since noon")
    with hold(run) as other:
        codes = []
        for step in (1, 2, 3):
            checkpoint(run, step)
            codes.append(ask(run))
        other.communicate("\n")
    assert [code for code, _ in codes] == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]
    message = f"3 starts in a row got nowhere, and another job trains in {run} (process 7 on node1, since noon)"
    assert codes[-1][1] == message
    assert requeue.read_state(run) == {"status": "running"}
    assert ask(run)[0] == requeue.AGAIN  # nobody is there any more, and there is progress


def test_the_lock_that_a_dead_host_of_this_job_has_left_is_no_other_jobs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 0, "17")
    requeue.write_state(run, {"status": "running"})
    (run / "lock").write_text("process 7 on node1, since noon, job 17_2")
    with hold(run) as other:
        for step in (1, 2, 3, 4):
            checkpoint(run, step)
            assert ask(run)[0] == requeue.AGAIN
        other.communicate("\n")


def test_three_starts_that_never_begin(tmp_path: Path) -> None:
    codes = [ask(tmp_path / "run")[0] for _ in range(3)]
    assert codes == [requeue.AGAIN, requeue.AGAIN, requeue.FAILED]


def test_requeue_needs_only_python(tmp_path: Path) -> None:
    requeue.write_state(tmp_path, {"status": "complete"})
    command = [sys.executable, "-I", "-S", str(ROOT / "launcher/run/requeue.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (requeue.DONE, "done: the run is complete\n"), done.stderr
