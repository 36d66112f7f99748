"""Tritrain in Python: pretrain language models in 16 bits and finish them in 1.58.

    import tritrain

    run = tritrain.train("configs/quickstart.yaml", "phases.0.steps=20", ranks=1)
    run.history().to_pandas()
    loaded = tritrain.load_model(run.path)
    print("".join(loaded.generate("def ")))

Importing this imports nothing else; each name loads what it needs when it is first used. `Transformer`, `ModelConfig`,
`initialize_` and all of quantization need torch alone.
"""

import importlib
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

runpy.run_path(str(Path(__file__).resolve().parent / "launcher" / "hidden.py"))["check_packages"]()

if TYPE_CHECKING:
    from data.errors import DataError
    from launcher.errors import CheckpointError, ConfigError, LogError, PlacementError, TrainingError, UserError
    from launcher.inference.load import load_model
    from launcher.report.run import Run, open_run
    from model.config import ModelConfig
    from model.init import initialize_
    from model.transformer import Transformer
    from quant.config import PRESETS, QuantConfig
    from quant.linear import quantize_, set_strength_
    from quant.packed import freeze_

    __version__: str

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LogError",
    "ModelConfig",
    "PlacementError",
    "QuantConfig",
    "Run",
    "TrainingError",
    "Transformer",
    "UserError",
    "__version__",
    "freeze_",
    "initialize_",
    "load_model",
    "open_run",
    "quantize_",
    "set_strength_",
    "train",
]

_MODULES = {
    "PRESETS": "quant.config",
    "CheckpointError": "launcher.errors",
    "ConfigError": "launcher.errors",
    "DataError": "data.errors",
    "LogError": "launcher.errors",
    "ModelConfig": "model.config",
    "PlacementError": "launcher.errors",
    "QuantConfig": "quant.config",
    "Run": "launcher.report.run",
    "TrainingError": "launcher.errors",
    "Transformer": "model.transformer",
    "UserError": "launcher.errors",
    "freeze_": "quant.packed",
    "initialize_": "model.init",
    "load_model": "launcher.inference.load",
    "open_run": "launcher.report.run",
    "quantize_": "quant.linear",
    "set_strength_": "quant.linear",
}
"""Where each name is defined."""


def train(config: str | Path, *overrides: str, ranks: int | None = None) -> "Run":
    """Train on this machine, as the command `tritrain train` does, and return the run.

    The ranks are separate processes, so that their memory is free afterwards; their output is printed here. A run that
    was interrupted or has failed resumes from its last checkpoint; a complete run is returned at once.

    Args:
        config: a configuration file.
        overrides: `key.sub=value` each.
        ranks: number of processes; by default one per GPU, or one.

    Raises:
        ConfigError: the configuration is wrong; found before anything starts where possible.
        DataError: what the run reads is missing or does not fit it; not a `UserError`, because `data` stands alone.
        TrainingError: the run failed or was stopped; with the message that it left.
        KeyboardInterrupt: after an interrupt, when the run has saved.
    """
    from launcher.commands.train import check_arguments, train_in_subprocesses
    from launcher.process.torchrun import default_ranks
    from launcher.report.run import Run

    check_arguments(config, overrides, ranks)
    return Run(train_in_subprocesses(Path(config), overrides, ranks or default_ranks()))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from launcher.version import tritrain_version

        return tritrain_version()
    if name not in _MODULES:
        raise AttributeError(f"module 'tritrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
