"""How every section of the configuration is read: no key unknown, no type converted, no number infinite or NaN."""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True, "allow_inf_nan": False}
