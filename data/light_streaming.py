"""Import `streaming` without what text does not need.

Its top level imports its readers of images and of other data sets, and its loader two classes of `transformers`: with
these come pandas, pyarrow, scipy and torchvision, 3 s and 200 MB in every process. While `streaming` is imported, empty
modules have their names. They are gone afterwards, so that whoever imports the real ones gets them.
"""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec

from data.torchvision_repair import repair_torchvision

UNNEEDED = (
    "streaming.multimodal",
    "streaming.text",
    "streaming.vision",
    "transformers",
    "transformers.feature_extraction_utils",
    "transformers.tokenization_utils_base",
)


class _Empty(types.ModuleType):
    """A module in which each name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_streaming() -> None:
    """Import `streaming`; to be called before any `from streaming import ...`."""
    if "streaming" in sys.modules:
        return
    empty = {name: _Empty(name) for name in UNNEEDED if name not in sys.modules}
    sys.modules.update(empty)
    try:
        importlib.import_module("streaming")
    except (ImportError, AttributeError, TypeError):  # another version, which needs them
        for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
            del sys.modules[name]
    finally:
        for name, module in empty.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    if "streaming" not in sys.modules:
        repair_torchvision()
        importlib.import_module("streaming")
