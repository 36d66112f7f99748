"""Find the runs that somebody has named, and say what a folder is that is none."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.prepared import is_prepared
from launcher.checkpoint.folders import MANIFEST, complete_checkpoints
from launcher.checkpoint.strangers import is_checkpoint, is_run, is_study, runs_in
from launcher.errors import ConfigError

OF_A_RUN = "a run's folder has a config.yaml or state.json"


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs at or inside these folders, of a study those that have begun.

    Raises:
        ConfigError: some are or hold none; names them all, and what they are.
    """
    runs, strangers = [], []
    for folder in folders:
        found = [folder] if is_run(folder) else runs_in(folder)
        runs += found
        if not found:
            strangers.append(f"{folder}: {_not_a_run(folder)}")
    if strangers:
        raise ConfigError("\n".join(strangers))
    return list(dict.fromkeys(runs))


def find_run(folder: Path) -> Path:
    """The folder, if it is that of a run.

    Raises:
        ConfigError: it is not; says what it is.
    """
    if find_runs([folder]) != [folder]:
        raise ConfigError(f"{folder}: is no run but holds some; name one of them")
    return folder


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"no such folder; {OF_A_RUN}"
    if is_checkpoint(folder):
        if _is_average(folder):
            return "is an average of checkpoints, which has no log; name a run"
        return f"is a checkpoint{_of_run(folder)}"
    if complete_checkpoints(folder):
        return f"holds checkpoints{_of_run(folder)}"
    if is_study(folder):
        return "is a study, and none of its runs has begun"
    if is_prepared(folder):
        return "is prepared data (of `tritrain prepare`), not a run; `tritrain inspect` shows them"
    return f"is not a run and contains none; {OF_A_RUN}"


def _of_run(folder: Path) -> str:
    above = (Path(os.path.normpath(folder / up)) for up in ("..", "../.."))
    run = next((path for path in above if is_run(path)), None)
    return "; name the folder of its run" if run is None else f" of {run}; name the run"


def _is_average(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return "average" in json.loads((checkpoint / MANIFEST).read_bytes())["provenance"]
    return False
