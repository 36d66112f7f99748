"""A run's folder: its files, its lock, and the check that it belongs to a configuration.

RUN/config.yaml      the resolved configuration, with the code's version and the run's id
RUN/tokenizer.*      what made the run's tokens, copied from its data; every checkpoint has a copy as well
RUN/state.json       whether the run is running, interrupted, complete or failed
RUN/starts.jsonl     one line for each time that training began
RUN/saves.jsonl      one line for each checkpoint that was written
RUN/submitted/       code, configuration and script of each job of `tritrain submit`
RUN/stop, RUN/save   put there by a person: save and end, or save and go on
RUN/rollbacks.json   how often the run has gone back to a switch; only where it has
RUN/heartbeats.json  what each rank was at when it was last heard of
RUN/hangs/TIME/      stacks and collectives of each rank when a job hung; only where one has
RUN/lock             held by the process that trains here; a second one is refused
RUN/profile/          traces of steps (`logging.profile_steps`)
RUN/trackers/         what each tracker has (`logging.trackers`); RUN/wandb/, RUN/trackio/, RUN/mlflow/: their own files
RUN/reference/       log-probabilities that the references of preferences give (`launcher.run.references`)
RUN/row_losses.jsonl the loss of each held-out row at the ends of phases
RUN/metrics.jsonl, RUN/tensorboard/, RUN/checkpoints/, RUN/summary.json, RUN/report.html
"""

import fcntl
import json
import os
import shlex
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.new_paths import replace_file
from data.private import holder_text, is_at, no_follow
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import CHAT_TEMPLATE, TOKENIZERS, complete_checkpoints
from launcher.checkpoint.location import is_local, reaching, to_location
from launcher.config.file import (
    DERIVED_KEYS,
    MAX_YAML_CHARS,
    MAX_YAML_VALUES,
    dump_yaml,
    num_values,
    override_of,
    parse_yaml,
    to_tree,
)
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.course import make_course
from launcher.run.changes import begun_phase, changes, course_of, schedule_note, too_short, ways_on
from launcher.run.requeue import append_line, read_lines, read_state
from launcher.version import tritrain_version

LOCK = "lock"


OF_OTHERS = {"manifest.json": "a checkpoint or prepared data", "owner.json": "checkpoints", "config.json": "a model"}
"""Files that no run has in its folder, and what has them."""


REPLACED = (*TOKENIZERS, CHAT_TEMPLATE, "metrics.jsonl", "rollbacks.json", "summary.json", "scores.json", "report.html")
"""Files that a new run replaces or removes."""


MOST_VALUES, MOST_CHARS = MAX_YAML_VALUES * 9 // 10, MAX_YAML_CHARS * 9 // 10
"""The largest configuration of a run, which adds an id and the steps of its phases and reads all of it again."""


class RunFolder:
    """The folder of one run.

    Args:
        config: of the run that this process belongs to.

    Raises:
        ConfigError: it is so large that the run could not read its own `config.yaml`.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.run.path
        self.checkpoints = to_location(config.checkpoints)
        self.ranks = self.path / "ranks"
        self.holder = ""
        """What the lock says while this job holds it; the same on all of its ranks."""
        self.state_before: dict[str, Any] = {}
        """The status that the rank that holds the lock found, before it wrote its own."""
        self.found_complete = False
        """Whether this job found the run complete; the same on all of its ranks."""
        self.places_to_make: list[Path] = []
        """The folder of checkpoints and those above it, as far as this start makes them, the deepest first."""
        self._is_new = False
        self._run_id: str | None = None
        self.checkpoints_are_elsewhere = config.checkpoint.folder is not None
        """Whether the checkpoints have a place of their own, outside of the folder."""
        self.take(config)

    def take(self, config: Config) -> None:
        """Take the run's configuration; raises as the constructor does."""
        self.config, tree = config, to_tree(config)
        self.config_text = dump_yaml({"tritrain_version": tritrain_version(), **tree})
        sizes = num_values(tree), len(self.config_text)
        if sizes[0] > MOST_VALUES or sizes[1] > MOST_CHARS:
            longest = max(tree, key=lambda section: num_values(tree[section]))
            raise ConfigError(
                f"{longest}: with its defaults written out, the configuration has {sizes[0]:,} values and "
                f"{sizes[1]:,} characters; at most {MOST_VALUES:,} and {MOST_CHARS:,} fit into a run's config.yaml"
            )

    @property
    def run_id(self) -> str | None:
        """What tells this run from all others; None before its first start."""
        there = read_tree(self.path / "config.yaml")
        return self._run_id if there is None else there.get("run_id", self._run_id)

    def take_id(self, run_id: str) -> None:
        """Take an id that was this run's before its `config.yaml` was lost; `prepare` writes it."""
        self._run_id = run_id

    def has_traces(self) -> bool:
        """Return whether a run has written here, whatever has become of its `config.yaml`."""
        return any((self.path / name).exists() for name in ("state.json", "starts.jsonl", "saves.jsonl"))

    def check_not_of_others(self) -> None:
        """Check that a run which begins here replaces nothing that is not a run's.

        Raises:
            ConfigError: it would.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.folder: {self.path} is a file, not a folder; choose another run.folder")
        if self.has_traces() or complete_checkpoints(self.path / "checkpoints"):
            return
        there = [name for name in OF_OTHERS if (self.path / name).exists()]
        if there:
            raise ConfigError(
                f"run.folder: {self.path} is the folder of {OF_OTHERS[there[0]]} (it has {there[0]}), not of a run; "
                "choose another run.folder"
            )
        there = [name for name in REPLACED if (self.path / name).exists()]
        if there and read_tree(self.path / "config.yaml") is None:
            raise ConfigError(
                f"run.folder: {self.path} has files that no run wrote and that a run would replace: "
                f"{', '.join(there)}; choose another run.folder"
            )

    def check_new(self) -> None:
        """Check that the folder is one to be made: an unfinished conversion may have left something, and nobody else.

        Raises:
            ConfigError: it holds something else.
        """
        unfinished = (LOCK, "config.yaml", "checkpoints")
        others = sorted(path.name for path in self.path.glob("*") if path.name not in unfinished)
        if others and not self.has_traces():
            more = ", ..." if len(others) > 3 else ""
            raise ConfigError(f"{self.path}: holds other files ({', '.join(others[:3])}{more}); name a new folder")

    def check_configuration(self, kept: tuple[str, ...] = ()) -> None:
        """Check that the folder's content belongs to this configuration.

        A start that ended before its first step, because a path was wrong, say, has left nothing to go on with.

        Args:
            kept: keys that may not differ here, though they may where a run resumes.

        Raises:
            ConfigError: lists the keys that differ; or the folder, or the `config.yaml` there, is not a run's.
        """
        self.check_not_of_others()
        path = self.path / "config.yaml"
        if not path.exists():
            return
        there = read_tree(path)
        if there is None and self.has_traces():
            return  # a run's own, damaged: `set_damaged_aside` says so, and its checkpoints have the configuration
        if there is None or "tritrain_version" not in there:
            raise ConfigError(
                f"run.folder: {path} was not written by a run, and would be overwritten; choose another run.folder"
            )
        if (there := configuration_of_run(self.path)) is None:
            return
        before, step = course_of(there), self.last_saved_step() or 0
        begun = begun_phase(before, step).index if before else None
        if refused := [change for change in changes(there, self.config, begun, kept) if not change.is_allowed]:
            lines = [f"{self.path} holds a run with another configuration, and a resumed run must keep its own:"]
            lines += [change.line(str(self.path)) for change in refused]
            course = make_course(self.config)
            if before is not None:
                lines += schedule_note(before, course, step)
            ways = too_short(course.total_steps, step, self.config) or ways_on(refused, self.config, before, step)
            raise ConfigError("\n".join([*lines, ways]))

    def claim(self) -> None:
        """Lock the folder for the life of this process, so that no other one trains in it.

        Raises:
            ConfigError: another one does.
        """
        lock, is_held = self.path / LOCK, False
        while not is_held:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(lock, "a+", errors="replace", opener=no_follow)  # noqa: SIM115, held for life
            try:
                # A record lock: it ends with the process, however that ends, and file systems of clusters know it.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.seek(0)
                raise ConfigError(
                    f"{self.path}: another job trains here ({self._lock.read().strip() or error}); two would overwrite "
                    f"each other's checkpoints. Wait for it or stop it, or set {self.config.run.key_of_path} to begin "
                    "another run."
                ) from error
            is_held = is_at(self._lock, lock)  # else the start that had it has failed, and removed the folder
        places = [self.checkpoints, *self.checkpoints.parents] if is_local(self.checkpoints) else []
        self.places_to_make = [place for place in places if not place.exists()]
        self._is_new = {path.name for path in self.path.iterdir()} == {LOCK}
        self._lock.truncate(0)
        self.holder = holder_text() + (f", job {slurm_job()}" if slurm_job() else "")
        self._lock.write(self.holder)
        self._lock.flush()
        os.fsync(self._lock.fileno())  # the other hosts read it

    def set_damaged_aside(self) -> list[str]:
        """Set aside what a power cut or a full disk has left of a file that a start reads; a sentence for each."""
        damaged = {"config.yaml": read_tree(self.path / "config.yaml") is None, "state.json": not self.read_state()}
        paths = [self.path / name for name, is_damaged in damaged.items() if is_damaged]
        return [f"{path} is damaged, and set aside as {set_aside(path).name}." for path in paths if path.exists()]

    def is_of_first_start(self) -> bool:
        """Return whether this start made the folder and has not begun to train, so that nothing in it is of use."""
        kept = ("starts.jsonl", "saves.jsonl", "hangs", "submitted")
        return self._is_new and not any((self.path / name).exists() for name in kept)

    def is_ours(self) -> bool:
        """Return whether this job still owns the folder: a rank that was cut off may have lost it to a later job."""
        # Opened anew, since a handle may show what a network's disk once had. To close it lets go of the lock: only a
        # process that is about to end may ask.
        lock = self.path / LOCK
        return (lock.read_text(errors="replace") if lock.exists() else "") == self.holder

    def prepare(self, phase_steps: Sequence[int]) -> None:
        """Create the folder and resolve the configuration, with the number of steps of each phase.

        It is written now if nothing was trained here, else when training starts: a start that is refused leaves that of
        the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._run_id = self.run_id or uuid.uuid4().hex
        self.config_text += dump_yaml({"phase_steps": list(phase_steps), "run_id": self._run_id})
        if not (self.path / "starts.jsonl").exists():
            replace_file(self.path / "config.yaml", self.config_text)

    def keep_tokenizer(self, file: Path, template: Path | None = None) -> Path:
        """Copy the tokenizer into the folder, so that the run can be used without its data; returns the copy.

        A chat template is copied beside it.

        It says by itself which token ends documents, even if only the manifest of the data does.

        Raises:
            DataError: it cannot be read.
        """
        copy, content = self.path / f"tokenizer{file.suffix}", load_tokenizer(file).file_content()
        if not (copy.is_file() and copy.read_bytes() == content):
            replace_file(copy, content)
        for name in {*TOKENIZERS} - {copy.name}:  # of a start with other data, which ended before its first step
            (self.path / name).unlink(missing_ok=True)
        if template is None:
            (self.path / CHAT_TEMPLATE).unlink(missing_ok=True)
        else:
            replace_file(self.path / CHAT_TEMPLATE, template.read_bytes())
        return copy

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
        beat_seconds = self.config.watch.beat_seconds
        content = {"time": round(time.time(), 1), "beat_seconds": beat_seconds, "ranks": beats}
        replace_file(self.path / "heartbeats.json", json.dumps(content), durable=False)  # every few seconds

    def note_start(self, step: int, world_size: int) -> None:
        """Write the configuration, and append to `starts.jsonl` that training starts or resumes after this step."""
        replace_file(self.path / "config.yaml", self.config_text)
        line = {"time": time.time(), "step": step, "world_size": world_size, "host": socket.gethostname()}
        engine = {"name": self.config.engine.name, "zero_stage": self.config.engine.zero_stage}
        append_line(self.path / "starts.jsonl", line | {"job": slurm_job(), "engine": engine})

    def note_save(self, step: int) -> None:
        """Append to `saves.jsonl` that this is the newest checkpoint now."""
        append_line(self.path / "saves.jsonl", {"time": time.time(), "step": step})

    def last_saved_step(self) -> int | None:
        """The step of the newest checkpoint as it was noted; None if none was."""
        saves = read_lines(self.path / "saves.jsonl", "step")
        return saves[-1]["step"] if saves else None

    def starts(self) -> list[int]:
        """The step that training began or resumed at, of each start."""
        return [line["step"] for line in read_lines(self.path / "starts.jsonl", "step")]

    def is_complete(self, total_steps: int) -> bool:
        """Return whether the run has trained to its end; one that was made longer has not."""
        state = self.read_state()
        return state.get("status") == "complete" and state.get("steps", total_steps) == total_steps

    def completion(self) -> str:
        """What a start says that finds the run complete."""
        steps = make_course(self.config).total_steps
        return f"The run {self.config.run.name} is complete: {steps} steps, in {self.path}."

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary of a complete run."""
        replace_file(self.path / "summary.json", json.dumps(summary, indent=2))


def is_complete_run(config: Config) -> bool:
    """Return whether this run is complete, so that it reads nothing any more.

    A complete run with another configuration is not this one, even if it has the name.
    """
    if read_state(config.run.path).get("status") != "complete":
        return False
    folder = RunFolder(config)
    try:
        folder.check_configuration()
    except ConfigError:
        return False
    return folder.is_complete(make_course(config).total_steps)


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
        this = shlex.quote(override_of("run.folder", str(folder.absolute())))
        raise ConfigError(
            f"run.folder: {file} is that of the run in {folder}, and leads to {target.absolute()} from here. "
            f"To resume the run, add {this}; to begin another one, {another}"
        )


def holds_run(folder: Path, config: Config, run_id: str | None = None) -> bool:
    """Return whether a folder is that of a run, which may have gone on with changes since.

    A relative `run.folder` leads elsewhere from another directory, and perhaps to another run.

    Args:
        folder: of a run.
        config: what the run was configured as.
        run_id: of the run. Where one has no id, configurations are compared, but for `MAY_CHANGE`.
    """
    there = read_tree(folder / "config.yaml")
    if there is None:
        return False
    if run_id is not None and "run_id" in there:
        return bool(run_id == there["run_id"])
    return not changes(without_derived_keys(there), config)


def configuration_of_run(folder: Path) -> dict[str, Any] | None:
    """The configuration in the `config.yaml` of a run, as a tree; None if it has not begun or the file is damaged."""
    there = read_tree(folder / "config.yaml")
    if there is None or not ((folder / "starts.jsonl").exists() or read_state(folder).get("status") == "converted"):
        return None
    return without_derived_keys(there)


def without_derived_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's own `config.yaml` as it was configured."""
    return {key: value for key, value in tree.items() if key not in DERIVED_KEYS}


def slurm_job() -> str | None:
    """Id of the Slurm job that this process belongs to, `17` or `17_2` in an array; None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def read_tree(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None if there is none, or another content."""
    try:
        tree = parse_yaml(path.read_text(), str(path))
    except (OSError, ConfigError, UnicodeDecodeError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that a new one can be written and nothing is lost; returns its new name."""
    number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    return path.rename(path.with_name(f"{path.name}.damaged-{number}"))
