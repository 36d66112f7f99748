"""What a job finds around itself: its ranks, its end, and who asks for a stop."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import run_ranks
from slurm_stand_ins import SHOWN

from launcher.errors import ConfigError
from launcher.process.ranks import ALONE, _complete_environment, first_host, process_group
from launcher.watch.stopping import StopRequest, end_of_job, time_to_stop


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node[3-7,9]", "node3"),
        ("gpu-b[003-010],login", "gpu-b003"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]n[05,07-09]", "rack1n05"),
        ("c[12,14-16]-ib,d", "c12-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An environment of which nothing stays."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TRITRAIN_")) or name.endswith(("RANK", "WORLD_SIZE")):
            del os.environ[name]
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(before)


def test_ranks_of_a_slurm_step(environment: dict[str, str]) -> None:
    environment |= {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "9", "SLURM_NTASKS_PER_NODE": "4"}
    environment |= {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6"}
    environment |= {"SLURM_STEP_NODELIST": "node[07-10]", "SLURM_LOCALID": "0"}
    environment |= {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}  # as real as it is useless
    _complete_environment()
    expected = {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "MASTER_ADDR": "node07"}
    assert expected.items() <= environment.items()
    assert "LOCAL_WORLD_SIZE" not in environment  # `launcher.process.placement` counts
    assert environment["MASTER_PORT"] == "20273"


def test_a_batch_script_is_one_process(environment: dict[str, str]) -> None:
    environment |= {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    _complete_environment()
    assert environment["WORLD_SIZE"] == "1"


def test_a_process_alone_keeps_the_gpu_that_it_was_given(environment: dict[str, str]) -> None:
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}
    with process_group(60) as ranks:
        assert (ranks.world_size, ranks.local_rank) == (1, 3)


def test_end_of_a_job(environment: dict[str, str], programs: Path) -> None:
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    assert end_of_job(pytest.fail) == float("inf")
    environment |= {"SLURM_JOB_ID": "17", "TZ": "UTC"}
    import time

    time.tzset()
    assert end_of_job(pytest.fail) == 1767312000.0  # what `scontrol` shows
    environment["SLURM_JOB_END_TIME"] = "1900000000"
    assert end_of_job(pytest.fail) == 1900000000.0
    environment["TRITRAIN_END_TIME"] = f"{time.time() + 100}"
    assert time_to_stop(30, pytest.fail) == pytest.approx(time.time() + 70, abs=5)
    with pytest.raises(ConfigError, match="stop_before_end_seconds: is 180, but the job ends in"):
        time_to_stop(180, pytest.fail)
    environment["TRITRAIN_END_TIME"] = "noon"
    with pytest.raises(ConfigError, match="TRITRAIN_END_TIME: is 'noon'"):
        end_of_job(pytest.fail)


def test_a_slurm_that_does_not_say_when_the_job_ends(
    environment: dict[str, str], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.watch.stopping.SECONDS_BETWEEN_ASKS", 0.0)
    monkeypatch.setattr("launcher.watch.stopping.SECONDS_TO_ANSWER", 0.2)
    environment |= {"PATH": f"{programs}:{environment['PATH']}", "SLURM_JOB_ID": "17", "SLURM_TIME_FORMAT": "relative"}
    said: list[str] = []
    (programs / "scontrol").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert end_of_job(said.append) == float("inf")
    (programs / "scontrol").write_text("#!/bin/bash\nexec /bin/sleep 60\n")
    assert end_of_job(said.append) == float("inf")
    assert [re.search(r"\((.*?)\)", line)[1] for line in said] == [  # type: ignore[index]
        "Unable to contact slurm controller",
        "no answer in 0.2 s",
    ]
    once = f"[ -e {programs}/asked ] || {{ touch {programs}/asked; exit 1; }}"
    (programs / "scontrol").write_text(f"#!/bin/bash\n{once}\n[ $SLURM_TIME_FORMAT = standard ] && echo '{SHOWN}'\n")
    monkeypatch.setattr("launcher.watch.stopping.SECONDS_TO_ANSWER", 20.0)
    assert end_of_job(pytest.fail) < float("inf")


def test_files_and_the_clock_ask_for_a_stop_or_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.watch.stopping.SECONDS_BETWEEN_LOOKS", 0.0)
    stop = StopRequest()
    (tmp_path / "stop").touch()
    assert stop.agree(ALONE) == (False, False)  # watches nothing yet
    (tmp_path / "stop").unlink()
    stop.watch(tmp_path, float("inf"))
    (tmp_path / "save").touch()
    assert stop.agree(ALONE) == (False, True)
    assert not (tmp_path / "save").exists()
    assert stop.agree(ALONE) == (False, False)
    stop.watch(tmp_path, 0.0)
    assert stop.agree(ALONE) == (True, False)
    assert stop.reason == "time limit"
    (tmp_path / "stop").touch()
    assert stop.agree(ALONE) == (True, False)
    assert stop.reason == "stop file"
    assert (tmp_path / "stop").exists()  # until all is saved
    stop.done()
    assert not (tmp_path / "stop").exists()


def test_a_person_who_asks_for_a_stop_while_another_stop_is_being_saved(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.watch(tmp_path, 0.0)
    assert stop.agree(ALONE) == (True, False)
    stop.look_again()
    assert stop.reason == "time limit"
    (tmp_path / "stop").touch()
    stop.done()
    assert (tmp_path / "stop").exists()  # nothing has obeyed it
    stop.look_again()
    assert stop.reason == "stop file"
    stop.done()
    assert not (tmp_path / "stop").exists()


def ask_on_one_rank(rank: int, world_size: int, folder: str) -> tuple[tuple[bool, bool], str]:
    from launcher.process.ranks import Ranks

    stop = StopRequest()
    if rank == 0:
        (Path(folder) / "save").touch()
        stop.watch(Path(folder), float("inf"))
    if rank == 1:
        stop._handle(15, None)
    return stop.agree(Ranks(rank, world_size, rank, ALONE.device)), stop.reason


def test_all_ranks_agree_on_what_one_was_asked(tmp_path: Path) -> None:
    assert run_ranks(2, ask_on_one_rank, str(tmp_path)) == [((True, True), "signal")] * 2


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_asks_for_a_stop_unless_nohup_has_it_ignored(ignored: bool) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest().installed() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.agree(ALONE) == (not ignored, False)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, handler)
