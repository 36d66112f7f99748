"""Checkpoints of ternary models, to be exported."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hf_folders import ModelSource
from tiny import tiny_config

from launcher.checkpoint.folders import MANIFEST, TOKENIZERS, folder_of
from launcher.checkpoint.manifest import Manifest, Precision, Progress, manifest_digest, precision_at
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.file import to_tree
from launcher.config.sections import Config
from launcher.formats.convert import write_streamed
from launcher.formats.opened import Exportable
from launcher.plan.course import make_course
from model.transformer import ModelConfig, Transformer
from quant.config import QuantConfig
from quant.linear import quantize_


def write_checkpoint(
    config: Config,
    model: torch.nn.Module,
    *,
    step: int,
    phase: int,
    rollbacks: Mapping[int, int] | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """A run's folder with one checkpoint, as training leaves it, without training.

    Args:
        config: of the run.
        model: whose weights are in the checkpoint.
        step: of the checkpoint.
        phase: that the model is in.
        rollbacks: how often the run has gone back to the beginning of a phase, by the phase's index.
        tokenizer: a file that is copied into the checkpoint.
    """
    run = config.run.path
    writer = CheckpointWriter(folder_of(run / "checkpoints", step))
    writer.begin()
    files = write_streamed(writer, ModelSource(model))
    text = yaml.safe_dump({"tritrain_version": "0.1.0", **to_tree(config)}, sort_keys=False)
    at = Progress(step=step, phase=phase, skipped_steps=0)
    manifest = Manifest(
        milestone=True,
        has_moments=False,
        step=step,
        tokens=step * 256,
        progress=at,
        precision=precision_at(make_course(config, rollbacks), at),
        data_fingerprint=None,
        spikes=None,
        teacher=None,
        world_size=1,
        engine="fsdp2",
        zero_stage=2,
        provenance=None,
    )
    writer.finish(files, text, tokenizer, manifest)
    (run / "config.yaml").write_text(text)
    return writer.final


def exportable(model: Transformer, quantization: QuantConfig | None = None) -> Exportable:
    """A model as if it were a checkpoint of a run that has ended."""
    precision = Precision.full(quantization or QuantConfig(), model.config.num_layers)
    return Exportable(ModelSource(model), model.config, precision, None, None, None)


def ternary(model: Transformer, quantization: QuantConfig | None = None) -> Transformer:
    """A copy of a model that computes with codes."""
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    quantize_(copy, quantization or QuantConfig())
    return copy.eval()


def make_older(checkpoint: Path, *lacking: str) -> None:
    """Give a checkpoint a manifest of version 1, which says nothing of precisions, and lacks these keys besides.

    It has no tokenizer either.
    """
    tree = json.loads((checkpoint / MANIFEST).read_text())
    tree = {key: value for key, value in tree.items() if key not in ("precision", "digest", *lacking)}
    tree["format_version"] = 1
    for name in tree["files"].keys() & set(TOKENIZERS):
        del tree["files"][name]
        (checkpoint / name).unlink()
    (checkpoint / MANIFEST).write_text(json.dumps(tree | {"digest": manifest_digest(tree)}))


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
