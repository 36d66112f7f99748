"""What a folder is that somebody has named as a model or a run, and that is neither: for a sentence that says so.

Checkpoints and prepared data both have a `manifest.json`, checkpoints and runs a `config.yaml`.
"""

import os
from pathlib import Path

from data.prepared import is_prepared
from launcher.checkpoint.folders import CONFIG, MANIFEST, NAME
from launcher.checkpoint.location import is_local

OF_A_STUDY = ("study.yaml", "results.json")
"""Files of a study's folder, by which it is recognized."""

RUNS_OF_A_STUDY = ("arms", "trunks")
"""Folders of its runs."""

ELSEWHERE = "; where checkpoint.folder puts them elsewhere, name that folder"


def is_run(folder: Path) -> bool:
    """Return whether a local folder is that of a run."""
    # Not `Path.is_file`, to which a folder that others may not look into is an error.
    if os.path.isfile(folder / "state.json"):
        return True
    return os.path.isfile(folder / CONFIG) and not is_checkpoint(folder)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a local folder is a checkpoint or an average of some, complete or not."""
    return os.path.isfile(folder / CONFIG) and bool(NAME.fullmatch(folder.name) or os.path.isfile(folder / MANIFEST))


def is_study(folder: Path) -> bool:
    """Return whether a folder is that of a study."""
    return all((folder / name).is_file() for name in OF_A_STUDY)


def runs_in(folder: Path) -> list[Path]:
    """The runs in a local folder, or those of a study in its own."""
    folders = [folder / name for name in RUNS_OF_A_STUDY] if is_study(folder) else [folder]
    return [path for each in folders for path in sorted(each.glob("*")) if is_run(path)]


def not_a_model(folder: Path) -> str | None:
    """What a folder in which no model was found is, and what to name instead; None if that is not known.

    Args:
        folder: local or remote; runs and what holds them are recognized if it is local.
    """
    if is_prepared(folder):
        return "is prepared data (of `tritrain prepare`), not a model; name a run, a checkpoint or an export"
    if is_study(folder):
        return f"is a study, not a model; name one of its runs, which are in {folder / RUNS_OF_A_STUDY[0]}"
    if is_local(folder) and is_run(folder):
        return f"is a run without a complete checkpoint{ELSEWHERE}"
    if is_local(folder) and (runs := runs_in(folder)):
        return f"holds runs, and is no model; name one of them, such as {runs[0]}"
    return None
