"""A smoke test: a few steps of each phase of a run, through every switch, in a folder that is removed afterwards."""

import shutil
from dataclasses import replace
from pathlib import Path

from launcher.config.sections import Config
from launcher.errors import ConfigError

MARK = "smoke"
"""File in the folder of a smoke test, which nothing else may be removed for."""


def smoke_config(config: Config) -> Config:
    """The configuration of a run's smoke test: a run of its own, beside the other, with checkpoints in its folder."""
    path = config.run.path.with_name(f"{config.run.path.name}-smoke")
    return replace(
        config,
        run=replace(config.run, name=f"{config.run.name}-smoke", folder=str(path)),
        checkpoint=replace(config.checkpoint, folder=None),
    )


def clear_smoke(folder: Path) -> None:
    """Remove what an earlier smoke test left, and mark the folder as one's.

    Raises:
        ConfigError: something else is there.
    """
    if folder.exists():
        if not (folder / MARK).exists():
            raise ConfigError(f"{folder}: is in the way of a smoke test; move it, or set another run.name")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
