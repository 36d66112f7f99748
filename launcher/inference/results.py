"""Where the results of evaluations go: a file of results, and the TensorBoard of the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.new_paths import exclusive, replace_file
from launcher.checkpoint.location import is_local, to_location
from launcher.errors import ConfigError
from launcher.inference.sharded import Subject
from launcher.run.scores import RESULTS, read_results


def add_result(out: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of results, which other evaluations may be adding to as well."""
    with exclusive(out, wait=True):
        replace_file(out, json.dumps({"results": [*read_results(out), record]}, indent=2))


def default_results(subject: Subject) -> Path:
    """The default file of results: in the run's folder, or beside an export's.

    Raises:
        ConfigError: the model is in a store of objects, and its run is not here.
    """
    if subject.run is not None:
        return subject.run / RESULTS
    location = to_location(subject.location)
    if not is_local(location):
        raise ConfigError(f"--out: is missing; the run of {location} was not found, so name a file for the results")
    return location.with_name(f"{location.name}.{RESULTS}")


def write_points(folder: Path, task: str, scores: Mapping[str, float | None], step: int) -> None:
    """Write scores of a task beside a run's TensorBoard, as a curve of their own, at the step of the checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in scores.items():
            if value is not None:
                writer.add_scalar(f"eval/{task}/{name}", value, step)
