"""Programs that read exports.

llama.cpp is built from the source distribution of `llama-cpp-python`, in an environment of its own: some ten minutes
the first time. `TRITRAIN_LLAMA_ENVIRONMENT` names the environment's folder; the user's cache has it by default.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import LLAMA, LLAMA_ENVIRONMENT, SUPPORT

from data.torchvision_repair import repair_torchvision

NO_INDEX = ("No matching distribution", "Temporary failure in name resolution", "Connection", "timed out")


@pytest.fixture(scope="session")
def llama_python() -> Path:
    """The Python of an environment that has llama.cpp."""
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


@pytest.fixture
def ask(llama_python: Path, tmp_path: Path) -> Any:
    """Ask llama.cpp about a file; see `llama_client.py`."""

    def client(path: Path, **request: Any) -> dict[str, np.ndarray]:
        (tmp_path / "request.json").write_text(json.dumps(request))
        script = SUPPORT / "llama_client.py"
        arguments = [path, tmp_path / "request.json", tmp_path / "answer.npz"]
        done = subprocess.run([llama_python, script, *arguments], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return dict(np.load(tmp_path / "answer.npz"))

    return client


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    """The package; its packed layers are not compiled, which would take minutes at their first call."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    repair_torchvision()
    yield pytest.importorskip("transformers")
    torch._dynamo.config.disable = False
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
