"""Make a torchvision that was built for another torch importable.

The package index's torchvision is a CUDA build. Beside a CPU-only torch its compiled part cannot be loaded, and
`import torchvision` ends in `RuntimeError: operator torchvision::nms does not exist`, because its Python part registers
shape functions for operators that nobody declared. `streaming` and the Llama classes of `transformers` import
torchvision without needing any of its operators, so they fail as well. Declaring the operators, with no implementation,
is enough: calling one still raises, and everything else works.
"""

import importlib
import importlib.util
import sys
import warnings
from typing import Any

MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declarations: list[Any] = []  # a Library takes its declarations along when it is collected


def repair_torchvision() -> bool:
    """Import torchvision, declaring the operators that its compiled part should have brought if that fails.

    Call it before `import streaming` or a Llama of `transformers`. It does nothing where torchvision is absent, healthy
    or already repaired; an import that fails for any other reason raises what it raised. Returns whether this process
    needed the repair, and so whether programs without it fail in this environment.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return bool(_declarations)
    try:
        _import_quietly()
        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in MISSING_OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _declarations.append(library)
    _import_quietly()
    return True


def _import_quietly() -> None:
    with warnings.catch_warnings():
        # The compiled part that cannot be loaded is what this module is about; nobody here decodes images.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        importlib.import_module("torchvision")
