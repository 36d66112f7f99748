"""The jobs of a study: runs of arms and trunks, and what their folders say of them.

The folders are the whole state. A job is done if its run is, and it belongs to the process that holds its lock, which
ends with the process. So a study that was killed goes on with the same command, and several commands on one folder
share the work.
"""

import errno
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from launcher.checkpoint.folders import MANIFEST, complete_checkpoints, folder_of
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.plan import Plan, make_plan
from launcher.run.folder import RunFolder
from launcher.study.arms import Arm
from launcher.study.sharing import Sharing, Trunk


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a study."""

    name: str
    """`arms/NAME` or `trunks/NAME`, the place of its folder in the study's."""
    plan: Plan
    begin: int
    """Steps that are finished where it begins."""
    end: int
    """Steps that are finished where it ends."""
    needs: str | None
    """The trunk that it continues."""
    is_trunk: bool

    @property
    def config(self) -> Config:
        """Its configuration, which for a trunk goes on beyond its end."""
        return self.plan.config

    @cached_property
    def folder(self) -> RunFolder:
        """Its run."""
        return RunFolder(self.config)

    @property
    def is_done(self) -> bool:
        """Whether it has been trained to its end."""
        if self.is_trunk:
            return (folder_of(self.folder.checkpoints, self.end) / MANIFEST).is_file()
        return self.folder.is_complete(self.end)

    @property
    def has_begun(self) -> bool:
        """Whether it has something of its own to go on from, so that it needs no trunk."""
        return self.is_done or bool(complete_checkpoints(self.folder.checkpoints))

    @property
    def step(self) -> int:
        """Steps that are finished: as its ranks last said, or by its newest checkpoint."""
        if self.is_done:
            return self.end
        saved = self.folder.last_saved_step() or self.begin
        try:
            beats = json.loads((self.folder.path / "heartbeats.json").read_text())
            return max(saved, min(self.end, *(beat["step"] for beat in beats["ranks"])))
        except (OSError, ValueError, KeyError, TypeError):
            return saved


def jobs_of(arms: Sequence[Arm], sharing: Sharing, out: Path) -> list[Job]:
    """All jobs of a study in the order in which they are started: trunks that others need first, the longest first."""
    jobs = [_job_of_trunk(trunk, out) for trunk in sharing.trunks]
    parents = sharing.parents
    own = [
        Job(
            name=f"arms/{arm.name}",
            plan=arm.plan,
            begin=sharing.begin_of(arm),
            end=arm.plan.total_steps,
            needs=f"trunks/{parent}" if (parent := parents[arm.name]) else None,
            is_trunk=False,
        )
        for arm in arms
    ]
    return jobs + sorted(own, key=lambda job: job.begin - job.end)


def _job_of_trunk(trunk: Trunk, out: Path) -> Job:
    """The job of a trunk; one that has begun goes on with its configuration.

    That may be of another arm than the one that is first now. The trunk's name says that both train the same.
    """
    name = f"trunks/{trunk.name}"
    stored = out / name / "config.yaml"
    config = load_config(stored, stored=True) if stored.is_file() else trunk.arm.config
    config = replace(config, run=replace(config.run, name=f"trunk-{trunk.name}", folder=str(out / name)))
    return Job(
        name=name,
        plan=make_plan(config, trunk.arm.plan.world_size),
        begin=trunk.begin,
        end=trunk.end,
        needs=f"trunks/{trunk.parent}" if trunk.parent else None,
        is_trunk=True,
    )


def needed(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are yet to be run: arms that are not done, and trunks that one of these begins with."""
    wanted: dict[str, Job] = {}
    for job in reversed(jobs):  # those that need a trunk come after it
        begins_others = any(other.needs == job.name and not other.has_begun for other in wanted.values())
        if (begins_others or not job.is_trunk) and not job.is_done:
            wanted[job.name] = job
    return [job for job in jobs if job.name in wanted]


def spent(jobs: Sequence[Job]) -> list[Job]:
    """The complete trunks that no job is yet to begin with."""
    wanted = needed(jobs)
    return [
        job
        for job in jobs
        if job.is_trunk and job.is_done and not any(other.needs == job.name and not other.has_begun for other in wanted)
    ]


def lock_of(job: Job, out: Path) -> Path:
    """The file whose lock is held by the process that runs a job."""
    return out / "claims" / f"{job.name.replace('/', '-')}.lock"


@contextmanager
def claimed(job: Job, out: Path) -> Iterator[bool]:
    """Hold the lock of a job; yields False if another process has it.

    Raises:
        ConfigError: the folder's file system has no locks.
    """
    path = lock_of(job, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # POSIX allows both for a lock that is held
                raise ConfigError(
                    f"--out {out}: {path.parent}: cannot be locked ({errno.errorcode.get(error.errno or 0)}: "
                    f"{error.strerror}); a study needs a folder on a file system with locks"
                ) from error
            yield False
        else:
            yield True
