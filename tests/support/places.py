"""Folders that tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
"""Real text and evaluation sets, where they lie beside the checkout."""

LLAMA = "llama-cpp-python==0.3.36"
LLAMA_ENVIRONMENT = Path(
    os.environ.get(
        "TRITRAIN_LLAMA_ENVIRONMENT",
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "tritrain", LLAMA.replace("==", "-")),
    )
)
"""The environment that has llama.cpp; see `tests/launcher/formats/conftest.py`, which builds it."""
