"""`tritrain average`: write the average of checkpoints as a checkpoint."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoint.folders import MANIFEST, checkpoints_under
from launcher.checkpoint.location import reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.average import REASON, average_of, is_quantized, listed, record_of, write_average
from launcher.formats.open import open_source
from launcher.process.console import Console


def average_checkpoints(
    places: Sequence[str], to: Path, console: Console, *, last: int | None, decay: float | None, across_ternary: bool
) -> None:
    """Average checkpoints, and say which were taken.

    Args:
        places: checkpoints; with ``last``, one run or folder of checkpoints.
        to: the folder to write.
        console: where to print.
        last: how many of the newest checkpoints of the run's last 16-bit phase to take.
        decay: each checkpoint weighs this much of the one after it; None weighs all alike.
        across_ternary: whether checkpoints of ternary phases are accepted.

    Raises:
        ConfigError: the options do not fit together, or there are fewer checkpoints.
        CheckpointError: the checkpoints do not fit together, or are damaged; or the folder cannot be written.
    """
    if last is None:
        readers = [open_checkpoint(place, alone=len(places) == 1) for place in places]
    elif len(places) > 1:
        raise ConfigError(f"--last {last}: belongs to one run, and {len(places)} places are named")
    else:
        readers = newest_of_phase(places[0], last, across_ternary=across_ternary)
    source = average_of(readers, decay=decay, across_ternary=across_ternary)
    record = record_of(source)
    rows = [[made_of["source"], f"{made_of['step']:,}", f"{made_of['share']:.4f}"] for made_of in record["sources"]]
    console.aligned([["checkpoint", "step", "share"], *rows])
    write_average(source, to)
    console.line(f"Written: {to}. It has no moments; a run that starts from it needs transition.optimizer: reset.")
    console.line(f"To measure it: tritrain perplexity {shlex.quote(str(to))} FILE")


def open_checkpoint(place: str, *, alone: bool) -> CheckpointReader:
    """Open a checkpoint, or the newest of a run if it is one of several places."""
    location = to_location(place)
    with reaching(location):
        if alone and not (location / MANIFEST).is_file() and checkpoints_under(location):
            raise ConfigError(f"{place}: is a run; say with --last N how many of its checkpoints to average")
    source = open_source(place)
    if not isinstance(source, CheckpointReader):
        raise CheckpointError(f"{place}: is no checkpoint of Tritrain; `tritrain convert` makes a run that has one")
    return source


def newest_of_phase(place: str, count: int, *, across_ternary: bool) -> list[CheckpointReader]:
    """The newest checkpoints of a run's last 16-bit phase; with ``across_ternary``, of its last phase.

    Raises:
        CheckpointError: there are no checkpoints, one is damaged, or none is in 16 bits.
        ConfigError: there are fewer.
    """
    location = to_location(place)
    with reaching(location):
        folders = checkpoints_under(location)
    if not folders:
        raise CheckpointError(f"{place}: has no complete checkpoints; --last takes a run or a folder of checkpoints")
    taken: list[CheckpointReader] = []
    for folder in reversed(folders):
        reader = CheckpointReader(folder)
        if not across_ternary and is_quantized(reader):
            continue
        if taken and reader.manifest.progress.phase != taken[0].manifest.progress.phase:
            break
        taken.append(reader)
        if len(taken) == count:
            return taken
    if not taken:
        raise CheckpointError(f"{place}: all of its checkpoints are of ternary phases, and {REASON}")
    steps = listed([reader.manifest.step for reader in reversed(taken)])
    raise ConfigError(
        f"--last {count}: {place} has only {len(taken)} of phase {taken[0].manifest.progress.phase}, at {steps}; lower "
        "it, or keep more in the next run with checkpoint.interval_steps and checkpoint.keep_last"
    )
