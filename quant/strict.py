"""How the configurations of this folder are read: no key unknown, no type converted, no number infinite or NaN.

Pydantic reads it; the folder itself does not need Pydantic.
"""

from typing import Any

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True, "allow_inf_nan": False}
