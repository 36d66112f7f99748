"""llama.cpp, built from the source distribution of `llama-cpp-python` in an environment of its own.

That takes some ten minutes the first time. `TRITRAIN_LLAMA_ENVIRONMENT` names the environment's folder; by default it
is in the user's cache.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LLAMA = "llama-cpp-python==0.3.36"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tritrain"
LLAMA_ENVIRONMENT = Path(os.environ.get("TRITRAIN_LLAMA_ENVIRONMENT", CACHE / LLAMA.replace("==", "-")))
NO_INDEX = ("No matching distribution", "Temporary failure in name resolution", "Connection", "timed out")


def python_with_llama() -> Path:
    """The Python of that environment, which is made where it does not exist."""
    python = LLAMA_ENVIRONMENT / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        return python
    subprocess.run([sys.executable, "-m", "venv", LLAMA_ENVIRONMENT], check=True)
    pip = [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", LLAMA]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        if any(sign in installed.stderr for sign in NO_INDEX):
            pytest.skip(f"{LLAMA} cannot be had here: {installed.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{LLAMA} could not be built:\n{installed.stdout[-3000:]}\n{installed.stderr[-3000:]}")
    return python
