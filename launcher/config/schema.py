"""The JSON schema of the configuration, in which each key has the docstring below its field.

The docstrings are read from the source, which takes longer than to read a configuration, so only the schema has them.
"""

import ast
import functools
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from launcher.config.sections import Config


@functools.cache
def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors; one object for all callers, not to be changed."""
    schema = TypeAdapter(Config).json_schema(schema_generator=_Documented)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Documented(GenerateJsonSchema):
    """pydantic's schema, with docstrings of fields."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        made = super().dataclass_schema(schema)
        for name, docstring in _docstrings_of_fields(schema["cls"]).items():
            made["properties"][name]["description"] = docstring
        return made


def _docstrings_of_fields(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                found[name] = inspect.cleandoc(docstring)
    return found
