"""A process that runs one job of a study, forked from one that has imported everything.

Starting a Python that trains takes seconds, and so does writing a report at the end; a study of small runs would spend
more on these than on training. So a fork server imports once (`launcher.study.preloaded`). Each job still has a process
of its own: data sets keep shared memory, and a failure ends no other job.
"""

import atexit
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from launcher.config.file import dump_yaml, to_tree
from launcher.process.launchers import LAUNCHERS
from launcher.process.torchrun import environment_of_ranks, pretrain_command, ranks_command
from launcher.study.config import Keep
from launcher.study.jobs import Job, claimed

BUSY = 75
"""Exit code of a worker whose job another process runs (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the workers of a study run."""

    out: Path
    """Folder of the study."""
    num_ranks: int
    """Of each run."""
    threads: int
    """Threads of each rank on a CPU."""
    gpus: tuple[str, ...] = ()
    """GPUs that this worker may use, as CUDA numbers them; empty: all, or none."""


def work(job: Job, trunk: Path | None, place: Place, keep: Keep, study_pid: int) -> None:
    """Run a job to its end, and end this process with the exit code of its run.

    Args:
        job: to run.
        trunk: folder of the run that it begins with, if it has not begun.
        place: where.
        keep: as `Study.keep`.
        study_pid: the process of the study; the run saves and ends if that is killed.
    """
    os.setsid()  # a terminal's Ctrl-C reaches the run once, through the study
    environment = {LAUNCHERS: str(study_pid), "OMP_NUM_THREADS": str(place.threads)}
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)} if place.gpus else {}
    os.environ.update(environment)
    log = place.out / "logs" / f"{job.name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = 1
    try:
        with claimed(job, place.out) as is_mine:
            code = _run(job, trunk, place, keep) if is_mine else BUSY
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # forked processes skip them, and `streaming` would leave its shared memory
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(job: Job, trunk: Path | None, place: Place, keep: Keep) -> int:
    """Train in this process, or in one for each rank; returns 0 if the job is done."""
    from launcher.study.branch import branch

    if job.is_done:
        return 0
    if trunk is not None and not job.has_begun:
        assert job.begin
        branch(job.config, trunk, job.begin)
    config = place.out / "configs" / f"{job.name.replace('/', '-')}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(dump_yaml(to_tree(job.config)))
    options = ["--no-report", *(["--stop-at-step", str(job.end)] if job.is_trunk else [])]
    code = _train(config, options, place)
    if not job.is_done:
        return code or 1
    if not job.is_trunk and keep != "all":
        _remove_checkpoints(job, keep_last=keep == "ends")
    return 0


def _train(config: Path, options: list[str], place: Place) -> int:
    if place.num_ranks > 1:
        command = ranks_command(place.num_ranks, [*pretrain_command(config, []), *options])
        with subprocess.Popen(command, env=environment_of_ranks()) as process:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: process.send_signal(number))
            return process.wait()
    import torch

    from launcher.pretrain import main

    torch.set_num_threads(place.threads)
    return main(["--config", str(config), *options])


def _remove_checkpoints(job: Job, *, keep_last: bool) -> None:
    from launcher.checkpoint.folders import complete_checkpoints
    from launcher.checkpoint.writer import remove_checkpoint

    found = complete_checkpoints(job.folder.checkpoints)
    for folder in found[:-1] if keep_last else found:
        remove_checkpoint(folder)
