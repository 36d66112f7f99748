"""Strict reading of this folder's configurations: no unknown key, no converted type, no infinite number or NaN.

Pydantic reads it; the folder itself does not need Pydantic.
"""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
