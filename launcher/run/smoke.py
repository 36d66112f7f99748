"""A smoke test: a few steps of each phase of a run, through every switch, in a folder that is removed afterwards."""

import shutil
from dataclasses import replace
from pathlib import Path

from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.run.folder import LOCK

MARK = "smoke"
"""File in the folder of a smoke test, which nothing else may be removed for."""


def smoke_config(config: Config) -> Config:
    """The configuration of a run's smoke test: a run of its own, beside the other, with checkpoints in its folder.

    Trackers would keep it after its folder was removed, so it has none.
    """
    path = config.run.path.with_name(f"{config.run.path.name}-smoke")
    return replace(
        config,
        run=replace(config.run, name=f"{config.run.name}-smoke", folder=str(path)),
        checkpoint=replace(config.checkpoint, folder=None),
        logging=replace(config.logging, trackers=()),
    )


def is_smoke_test(folder: Path) -> bool:
    """Return whether a folder is that of a smoke test."""
    return (folder / MARK).exists()


def check_smoke(folder: Path) -> None:
    """Check that nothing but an earlier smoke test is where this one is going to be.

    Raises:
        ConfigError: something else is there.
    """
    if contents(folder) and not is_smoke_test(folder):
        raise ConfigError(f"{folder}: is in the way of a smoke test; move it, or set another run.name")


def clear_smoke(folder: Path) -> None:
    """Remove what an earlier smoke test left, and mark the folder as one's; whoever calls this holds its lock."""
    for path in contents(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / MARK).touch()


def contents(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock, the mark, and what NFS keeps there of removed files that are open."""
    paths = folder.iterdir() if folder.exists() else []
    return [path for path in paths if path.name not in (LOCK, MARK) and not path.name.startswith(".nfs")]
