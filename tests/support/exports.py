"""Checkpoints of ternary models, to be exported."""

from pathlib import Path
from typing import Any

import torch
import yaml
from hf_folders import ModelSource
from tiny import tiny_config

from launcher.checkpoint.folders import folder_of
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.file import to_tree
from launcher.config.sections import Config
from launcher.formats.convert import write_streamed
from model.transformer import ModelConfig


def write_checkpoint(config: Config, model: torch.nn.Module, *, step: int, phase: int) -> Path:
    """A run's folder with one checkpoint, as training leaves it, without training."""
    run = config.run.path
    writer = CheckpointWriter(folder_of(run / "checkpoints", step))
    writer.begin()
    files = write_streamed(writer, ModelSource(model))
    text = yaml.safe_dump(to_tree(config))
    progress = {"step": step, "phase": phase, "skipped_steps": 0}
    counters = {"step": step, "tokens": step * 256, "progress": progress, "data_fingerprint": None}
    writer.finish(files, text, counters, milestone=True, has_moments=False)
    (run / "config.yaml").write_text(text)
    return writer.final


def model_tree(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if value is not None}


def ternary_config(
    shards: Path, run: Path, model: ModelConfig, quantization: dict[str, Any] | None = None, **transition: Any
) -> Config:
    """A run of 4 steps in 16 bits and 4 ternary ones."""
    ternary: dict[str, Any] = {"precision": "ternary", "steps": 4, "transition": transition}
    if quantization:
        ternary["quantization"] = quantization
    return tiny_config(
        shards,
        run,
        model={**model_tree(model), "max_sequence_length": 128},
        phases=[{"precision": "16-bit", "steps": 4}, ternary],
    )
