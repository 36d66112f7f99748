"""The version of Tritrain."""

import tomllib
from importlib import metadata

from launcher.hidden import ROOT


def tritrain_version() -> str:
    """Return that of the installed project or, in a checkout that only is on Python's path, that of the checkout."""
    try:
        return metadata.version("tritrain")
    except metadata.PackageNotFoundError:
        project: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return project["version"]
