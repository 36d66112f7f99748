"""Checkpoints belong to one run: their folder is its own, and they were trained with its configuration.

    CHECKPOINTS/owner.json     the run whose folder of checkpoints this is

A run is known by the `run_id` in its `config.yaml`, which stays the same where the run is moved. Each checkpoint has
the configuration that it was trained with, and the run that goes on from it is compared with that: `RUN/config.yaml`
may have been changed, lost, or be that of a start that failed.
"""

import contextlib
import json
import os
import socket
import time
from contextlib import nullcontext
from typing import Any

from data.new_paths import exclusive
from launcher.checkpoint.folders import CONFIG, complete_checkpoints
from launcher.checkpoint.location import is_local, reaching
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.file import DERIVED_KEYS, parse_yaml
from launcher.errors import ConfigError
from launcher.plan.course import Course, make_course
from launcher.plan.plan import Plan
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import Ranks, everyones
from launcher.run.changes import changes, check_strength, course_of, new_phase, schedule_note, too_short, ways_on
from launcher.run.folder import RunFolder

OWNER = "owner.json"

SECONDS_TO_APPEAR = 10.0
"""Of a new file, on the other hosts."""


def check_owner(folder: RunFolder) -> bool:
    """Check that no other run has its checkpoints in this run's folder for them; returns whether this run is noted.

    A run that has lost its id with its `config.yaml`, or is of a version without, has the id that is noted for its
    folder.

    Raises:
        ConfigError: another one has.
        CheckpointError: the store cannot be reached.
    """
    path = folder.checkpoints / OWNER
    with reaching(folder.checkpoints):
        owner = read_owner(folder)
        if owner is None:
            return False
        if folder.run_id is None and folder.has_traces() and owner.get("folder") == place_of(folder)["folder"]:
            folder.take_id(owner["run_id"])
        is_ours = owner["run_id"] == folder.run_id
        # A first start that was killed has left its note, and nothing else.
        is_free = {**owner, **place_of(folder)} == owner and not complete_checkpoints(folder.checkpoints)
    if not is_ours and not is_free and folder.checkpoints_are_elsewhere:
        raise ConfigError(
            f"checkpoint.folder: {folder.checkpoints} has the checkpoints of another run, {owner.get('name')} in "
            f"{owner.get('folder')} on {owner.get('host')}. Give this run another checkpoint.folder. To begin with "
            "that run's weights, set checkpoint.start_from. If it is this run, and its folder was lost, remove "
            f"{path}."
        )
    return is_ours


def claim_checkpoints(folder: RunFolder) -> None:
    """Note in the folder of checkpoints that it belongs to this run; raises what `check_owner` does."""
    path = folder.checkpoints / OWNER
    # Of two runs that begin at once one must see the other's note; stores of objects have no locks.
    with exclusive(path, wait=True) if is_local(path) else nullcontext():
        if not check_owner(folder):
            owner = {"run_id": folder.run_id, "name": folder.config.run.name, **place_of(folder)}
            with reaching(folder.checkpoints):
                path.write_bytes(json.dumps(owner, indent=2).encode())


def release_checkpoints(folder: RunFolder) -> None:
    """Take the note of a run that never began out of the folder of checkpoints, and remove the folder if it made it.

    Another run's note stays.

    Raises:
        CheckpointError: the store cannot be reached.
    """
    with reaching(folder.checkpoints):
        owner = read_owner(folder)
        if owner is not None and owner["run_id"] == folder.run_id:
            (folder.checkpoints / OWNER).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something in it, or it was never made
            for place in folder.places_to_make:
                place.rmdir()


def check_shared(folder: RunFolder, ranks: Ranks) -> None:
    """Check that all ranks find what the first one writes in the folder of checkpoints; a collective.

    Raises:
        CheckpointError: the store cannot be reached.
        ConfigError: names the hosts that find nothing.
    """
    note = folder.checkpoints / f"for-all-{value_of_first(os.getpid())}"
    with failing_alike(), reaching(note):
        if ranks.is_first:
            note.write_bytes(b"to be found by all ranks")
    until = time.monotonic() + SECONDS_TO_APPEAR
    with reaching(note):
        while not (found := note.exists()) and time.monotonic() < until:
            time.sleep(0.1)
    without = everyones([] if found else [socket.gethostname()], ranks)
    if ranks.is_first:
        note.unlink(missing_ok=True)
    if without:
        raise ConfigError(
            f"checkpoint.folder: what the first rank writes to {folder.checkpoints.absolute()} is not there on "
            f"{', '.join(without)}. It must lie on a disk that all hosts share, under one path; a relative path begins "
            "in the folder that a rank was started in."
        )


def read_owner(folder: RunFolder) -> dict[str, Any] | None:
    """The note in the folder of checkpoints; None if there is none, or it is damaged."""
    try:
        owner = json.loads((folder.checkpoints / OWNER).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get("run_id"), str) else None


def place_of(folder: RunFolder) -> dict[str, str]:
    """The place of a run's folder."""
    return {"folder": str(folder.path.absolute()), "host": socket.gethostname()}


def check_nothing_lost(folder: RunFolder, first_step: int) -> None:
    """Check, where there is no checkpoint, that there never was one: a run that has saved does not begin anew.

    Args:
        folder: of the run; versions before `saves.jsonl` leave its state and its starts to tell.
        first_step: where the run begins.

    Raises:
        ConfigError: there was one.
    """
    saved, state = folder.last_saved_step(), folder.state_before or folder.read_state()
    starts, status = folder.starts(), state.get("status")
    if saved is None and starts and starts[-1] > first_step:
        saved = starts[-1]
    # One that was stopped before its first step has nothing, and says so.
    was_stopped = status == "interrupted" and state.get("checkpoint", "") is not None
    if saved is None and not (was_stopped or status in ("complete", "converted")):
        return
    done = "was converted" if status == "converted" else "has trained and saved"
    raise ConfigError(
        f"checkpoint.folder: {folder.checkpoints} has no checkpoint, but {folder.path} is a run that {done}"
        f"{'' if saved is None else f' step {saved}'}; it does not begin anew by itself. Put the checkpoints back, "
        "or set checkpoint.folder to where they are. To train from the beginning, set "
        f"{folder.config.run.key_of_path} to begin another run, or remove {folder.path}."
    )


def check_checkpoint(reader: CheckpointReader, folder: RunFolder, plan: Plan) -> list[str]:
    """Check that a checkpoint was trained with the run's configuration, but for what may differ.

    Returns:
        Lines about what `run.allow_changes` lets differ; none where nothing does.

    Raises:
        ConfigError: names every other key that differs; or the checkpoint has no place in the run.
    """
    with reaching(reader.folder):
        before = parse_yaml((reader.folder / CONFIG).read_text(), str(reader.folder / CONFIG))
    for derived in DERIVED_KEYS:
        before.pop(derived, None)
    earlier, step = course_of(before), reader.manifest.step
    differing = changes(before, folder.config, reader.manifest.progress.phase if earlier else None)
    refused = [change for change in differing if not change.is_allowed]
    note = schedule_note(earlier, plan, step) if earlier else []
    if refused:
        lines = [f"{reader.folder} was trained with another configuration than that of {folder.path}:"]
        lines += [change.line(reader.folder.name) for change in refused]
        ways = too_short(plan.total_steps, step, folder.config) or ways_on(refused, folder.config, earlier, step)
        raise ConfigError("\n".join([*lines, *note, ways]))
    check_position(reader, earlier, plan)
    if earlier is not None:
        check_strength(make_course(earlier.config, plan.rollbacks), plan, step)
    return [change.line(reader.folder.name) for change in differing] + note if differing else []


def check_position(reader: CheckpointReader, before: Course | None, plan: Plan) -> None:
    """Check that a checkpoint's step, phase and tokens are where they were, although lengths may have changed.

    Args:
        reader: of the checkpoint.
        before: the course that it was trained on, if that is known.
        plan: of the run that goes on from it.

    Raises:
        ConfigError: they are not.
    """
    manifest, at = reader.manifest, reader.manifest.progress
    tokens = plan.tokens_before(manifest.step)
    if manifest.tokens != tokens:
        raise ConfigError(
            f"training: {reader.folder} has {manifest.tokens} tokens in {manifest.step} steps, which would be {tokens} "
            "with this global batch; keep the batch of the steps that are trained, or begin another run with "
            "checkpoint.start_from"
        )
    if problem := too_short(plan.total_steps, at.step, plan.config):
        raise ConfigError(f"phases: {problem}")
    if at.phase < 0:  # before the first
        return
    phase = plan.phases[at.phase] if at.phase < len(plan.phases) else None
    is_moved = before is not None and phase is not None and before.phases[at.phase].start != phase.start
    if phase is None or is_moved or not phase.start <= at.step <= phase.end:
        place = "is not there" if phase is None else f"has steps {phase.start} to {phase.end}"
        raise ConfigError(
            f"phases: {reader.folder} is at step {at.step}, in phase {at.phase}, and that phase now {place}; keep the "
            "lengths of what is trained, or begin another run with checkpoint.start_from"
        )
    if before is None:
        return
    read, would = (list(each.drawn_before(at.step, each.phases[at.phase]).values()) for each in (before, plan))
    if read != would:
        raise ConfigError(
            f"phases: {reader.folder} has read {read} rows of the mixtures of its phases, which would be {would} now. "
            f"{new_phase(before, at.step)}"
        )
