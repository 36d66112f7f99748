"""The version of an installed project, and of a checkout that is not installed."""

import subprocess
import sys
from importlib.metadata import version

from places import ROOT

from launcher.version import tritrain_version


def test_a_checkout_that_is_not_installed_has_the_same_version() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from launcher.version import *; print(tritrain_version())"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    bare = subprocess.run(command, capture_output=True, text=True, check=True)
    assert bare.stdout.strip() == tritrain_version() == version("tritrain")
