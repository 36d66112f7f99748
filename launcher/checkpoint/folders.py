"""Names of checkpoint folders and their files, and which checkpoints are complete; no code that reads them."""

import re
from pathlib import Path

MANIFEST = "manifest.json"


DAMAGED_MANIFEST = "manifest.damaged.json"
"""What the manifest of a damaged checkpoint is called once it was set aside."""


CONFIG = "config.yaml"


TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""Names that the tokenizer's file may have in a checkpoint and in a run's folder."""


CHAT_TEMPLATE = "chat_template.jinja"
"""Beside the tokenizer's file, of a run that has learned from chats."""


NAME = re.compile(r"step-\d{8}")
"""Names of the checkpoints of a run."""


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the manifest of a checkpoint; many others have a file of that name."""
    return (folder / MANIFEST).is_file() and ((folder / CONFIG).is_file() or not (folder / "config.json").is_file())


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All folders with a manifest, oldest first."""
    return [folder for folder in _named(checkpoints) if (folder / MANIFEST).is_file()]


def unfinished_checkpoints(checkpoints: Path) -> list[Path]:
    """All folders that have no manifest, not even a damaged one: what saving, or removing, has left that was killed."""
    names = (MANIFEST, DAMAGED_MANIFEST)
    return [folder for folder in _named(checkpoints) if not any((folder / name).exists() for name in names)]


def _named(checkpoints: Path) -> list[Path]:
    folders = checkpoints.glob("step-*") if checkpoints.is_dir() else []
    return sorted((folder for folder in folders if NAME.fullmatch(folder.name)), key=lambda folder: folder.name)


def checkpoints_under(folder: Path) -> list[Path]:
    """All complete ones of a run, or of a folder that holds nothing but checkpoints; oldest first."""
    return [*complete_checkpoints(folder), *complete_checkpoints(folder / "checkpoints")]
