"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
"""Real text and evaluation sets, where they lie beside the checkout."""
