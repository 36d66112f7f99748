"""Paths in a configuration that would be taken for others."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import DataConfig
from launcher.config.mixtures import named_sources

if TYPE_CHECKING:
    from launcher.config.sections import PhaseConfig

    Phases = tuple[PhaseConfig, ...]

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""


def local_problem(text: str) -> str | None:
    """Say what is wrong with a path that must be on this machine's file systems; None if nothing is."""
    if "://" in text:
        return f"{text!r} is a URL; give a folder on this machine's file systems"
    return mistaken_path(text)


def mistaken_path(text: str) -> str | None:
    """Say what is wrong with a path that is meant as another; None if nothing is.

    It begins with `~`, which the shell replaces only at the beginning of a word, or is a URL that lacks a slash.
    """
    if text.startswith("~/"):
        return f"{text!r} would be a folder named '~'; write {str(Path.home() / text[2:])!r}"
    if scheme := re.match(r"([a-z][a-z0-9]+):/(?!/)", text):
        return f"{text!r} would be a folder named '{scheme[1]}:'; a URL begins with '{scheme[1]}://'"
    return None


def data_paths_name_no_home(data: DataConfig, phases: "Phases") -> Problems:
    """No shell replaces a `~` in the paths of the data."""
    if problem := mistaken_path(data.cache or ""):
        yield "data.cache", problem
    for path, source in named_sources(data, phases):
        if problem := mistaken_path(source.path):
            yield f"{path}.path", problem
