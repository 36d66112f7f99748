"""A check that no other file hides one of Tritrain's packages: a user's own `model.py` or `data.py`, for example.

Python looks beside a script, or in the working directory of a notebook, before it looks here. What it finds there would
fail later without saying why. This file imports nothing else: `tritrain` runs it by its path, because `launcher` may be
hidden too.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("launcher", "model", "data", "quant", "eval")

ROOT = Path(__file__).resolve().parents[1]


def check_packages() -> None:
    """Make sure that Python finds Tritrain's packages in this checkout.

    Raises:
        ImportError: another file is found first; names it.
    """
    for name in PACKAGES:
        module = sys.modules.get(name)
        spec = find_spec(name) if module is None else module.__spec__
        found = (spec and spec.origin) or getattr(module, "__file__", None)
        if found is None or Path(found).resolve() != ROOT / name / "__init__.py":
            raise ImportError(
                f"{found or name} hides Tritrain's package {name!r}, because Python finds it first; rename it, or "
                "start Python in another folder",
                name=name,
                path=found,
            )
