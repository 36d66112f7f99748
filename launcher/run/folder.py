"""A run's folder: its files, its lock, and the check that it belongs to a configuration.

RUN/config.yaml      the resolved configuration, with the code's version
RUN/tokenizer.*      what made the run's tokens, copied from its data; every checkpoint has a copy as well
RUN/state.json       whether the run is running, interrupted, complete or failed
RUN/starts.jsonl     one line for each time that training began
RUN/submitted/       code, configuration and script of each job of `tritrain submit`
RUN/stop, RUN/save   put there by a person: save and end, or save and go on
RUN/rollbacks.json   how often the run has gone back to a switch; only where it has
RUN/heartbeats.json  what each rank was at when it was last heard of
RUN/hangs/TIME/      stacks and collectives of each rank when a job hung; only where one has
RUN/lock             held by the process that trains here; a second one is refused
RUN/metrics.jsonl, RUN/tensorboard/, RUN/checkpoints/, RUN/summary.json, RUN/report.html
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from launcher.checkpoint.folders import TOKENIZERS, complete_checkpoints
from launcher.checkpoint.location import reaching, to_location
from launcher.config.file import DERIVED_KEYS, flat_lines, load_config, parse_yaml, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.run.requeue import append_line, read_state

MAY_CHANGE = (
    "run.folder",
    "run.stop_before_end_seconds",
    "logging.",
    "watch.",
    "evaluation.",
    "checkpoint.",
    "engine.",
    "data.workers",
    "data.cache",
    "data.validation_rows",
    "data.prepare",
    "training.micro_batch_sequences",
    "training.activation_checkpointing",
    "training.compile",
    "training.max_skipped_steps",
)
"""Keys that may differ when a run resumes: they decide how it runs, not what it trains."""


class RunFolder:
    """The folder of one run.

    Args:
        config: of the run that this process belongs to.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.run.path
        self.checkpoints = to_location(config.checkpoint.folder or self.path / "checkpoints")
        self.ranks = self.path / "ranks"
        self.holder = ""
        """What the lock says while this job holds it; the same on all of its ranks."""
        self._beat_seconds = config.watch.beat_seconds
        self._tree = to_tree(config)
        self.config_text = yaml.safe_dump({"tritrain_version": version("tritrain"), **self._tree}, sort_keys=False)

    def check_configuration(self) -> None:
        """Check that the folder's content belongs to this configuration.

        A start that ended before its first step, because a path was wrong, say, has left nothing to go on with.

        Raises:
            ConfigError: lists the keys that differ; or a person wrote the `config.yaml` there.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            return
        there = parse_yaml(path.read_text(), str(path))
        if not isinstance(there, dict) or "tritrain_version" not in there:
            raise ConfigError(
                f"run.folder: {path} was not written by a run, and would be overwritten; choose another run.folder"
            )
        if not (self.path / "starts.jsonl").exists() and self.read_state().get("status") != "converted":
            return
        for derived in DERIVED_KEYS:
            there.pop(derived, None)
        before = dict(line.split(": ", 1) for line in flat_lines(there))
        now = dict(line.split(": ", 1) for line in flat_lines(self._tree))
        differing = [
            f"  {key}: {before.get(key, 'not set')} in {self.path}, {now.get(key, 'not set')} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differing:
            raise ConfigError(
                f"{self.path} holds a run with another configuration, and a resumed run must keep its own:\n"
                + "\n".join(differing)
                + "\nSet run.name or run.folder to begin another run; with checkpoint.start_from=CHECKPOINT it begins "
                "with this one's weights."
            )

    def claim(self) -> None:
        """Lock the folder for the life of this process, so that no other one trains in it.

        Raises:
            ConfigError: another one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a+")
        try:
            # A record lock: it ends with the process, however that ends, and file systems of clusters know it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            raise ConfigError(
                f"{self.path}: another job trains here ({self._lock.read().strip() or error}); two would overwrite "
                "each other's checkpoints. Wait for it or stop it, or set run.name to begin another run."
            ) from error
        self._lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        job = f", job {slurm_job()}" if slurm_job() else ""
        self.holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}{job}"
        self._lock.write(self.holder)
        self._lock.flush()
        os.fsync(self._lock.fileno())  # the other hosts read it

    def is_ours(self) -> bool:
        """Return whether this job still owns the folder: a rank that was cut off may have lost it to a later job."""
        # Opened anew, since a handle may show what a network's disk once had. To close it lets go of the lock: only a
        # process that is about to end may ask.
        lock = self.path / "lock"
        return (lock.read_text() if lock.exists() else "") == self.holder

    def prepare(self, phase_steps: Sequence[int]) -> None:
        """Create the folder and write the configuration, with the number of steps of each phase."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.config_text += yaml.safe_dump({"phase_steps": list(phase_steps)})
        replace_file(self.path / "config.yaml", self.config_text)

    def keep_tokenizer(self, file: Path) -> None:
        """Copy the tokenizer into the folder, so that the run can be used without its data."""
        copy, content = self.path / f"tokenizer{file.suffix}", file.read_bytes()
        if not (copy.is_file() and copy.read_bytes() == content):
            replace_file(copy, content)
        for name in {*TOKENIZERS} - {copy.name}:  # of a start with other data, which ended before its first step
            (self.path / name).unlink(missing_ok=True)

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint.

        Raises:
            CheckpointError: the store that they are in cannot be reached.
        """
        with reaching(self.checkpoints):
            return next(reversed(complete_checkpoints(self.checkpoints)), None)

    def write_state(self, status: str, **details: Any) -> None:
        """Write the run's status: `running`, `interrupted`, `complete` or `failed`."""
        replace_file(self.path / "state.json", json.dumps({"status": status, **details}, indent=2))

    def read_state(self) -> dict[str, Any]:
        """The run's status; empty before the first start, and where the file is damaged, as by a power cut."""
        return read_state(self.path)

    def write_heartbeats(self, beats: list[dict[str, Any]]) -> None:
        """Write the last heartbeat of each rank, and the interval of the beats."""
        content = {"time": round(time.time(), 1), "beat_seconds": self._beat_seconds, "ranks": beats}
        replace_file(self.path / "heartbeats.json", json.dumps(content))

    def note_start(self, step: int, world_size: int) -> None:
        """Append to `starts.jsonl` that training starts or resumes after this step."""
        line = {"time": time.time(), "step": step, "world_size": world_size, "host": socket.gethostname()}
        engine = {key: self._tree["engine"][key] for key in ("name", "zero_stage")}
        append_line(self.path / "starts.jsonl", line | {"job": slurm_job(), "engine": engine})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary of a complete run."""
        replace_file(self.path / "summary.json", json.dumps(summary, indent=2))


def check_place(file: Path, overrides: Sequence[str], config: Config) -> None:
    """Check that a run's own `config.yaml` leads to that run, even if it was moved.

    Args:
        file: the configuration that was named.
        overrides: of its keys.
        config: what they come to.

    Raises:
        ConfigError: it would begin another run, and nothing says that this is meant.
    """
    folder, target = file.parent, config.run.path
    is_of_a_run = file.name == "config.yaml" and (folder / "state.json").is_file()
    decisive = ("run.folder=",) if config.run.folder else ("run.folder=", "run.name=")
    if not is_of_a_run or any(override.startswith(decisive) for override in overrides):
        return
    if not (target.exists() and folder.samefile(target)):
        another = "run.folder=FOLDER run.name=NAME" if config.run.folder else "run.name=NAME"
        raise ConfigError(
            f"run.folder: {file} is that of the run in {folder}, and leads to {target.absolute()} from here. "
            f"To resume the run, add run.folder={folder.absolute()}; to begin another one, {another}"
        )


def holds_run(folder: Path, config: Config) -> bool:
    """Return whether a folder is that of a run with this configuration, or with one that differs only in `MAY_CHANGE`.

    A relative `run.folder` leads elsewhere from another directory, and perhaps to another run.
    """
    try:
        there = load_config(folder / "config.yaml")
    except ConfigError:
        return False
    ours, theirs = (
        {line for line in flat_lines(to_tree(each)) if not line.startswith(MAY_CHANGE)} for each in (config, there)
    )
    return ours == theirs


def slurm_job() -> str | None:
    """Id of the Slurm job that this process belongs to, `17` or `17_2` in an array; None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
