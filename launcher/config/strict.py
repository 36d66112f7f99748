"""Strict reading of every section: unknown keys, other types, infinity and NaN are errors."""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
