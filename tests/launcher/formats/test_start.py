"""A broken model is refused where it is taken, before anything is written or trained."""

from pathlib import Path

import pytest
import torch
import variants
import yaml
from command import tritrain
from exports import ternary_config
from hf_folders import ModelSource, write_variant
from models import VARIANTS
from ranks import run_group
from safetensors.torch import load_file, save_file

from launcher.checkpoint.load import load_state
from launcher.config.file import to_tree
from launcher.errors import CheckpointError
from model.transformer import Transformer

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("options", ["run", "hf", "universal", "export"])
def test_weights_that_are_not_finite_are_not_taken(shards: Path, tmp_path: Path, value: float, options: str) -> None:
    folder, to = tmp_path / "hf", tmp_path / "to"
    write_variant(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_tree(ternary_config(shards, tmp_path / "run", VARIANTS["llama"]))))
    arguments = {
        "run": ("convert", folder, "run.name=x", "--to", to, "--config", config, "--optimizer", "reset"),
        "export": ("export", folder, "--to", to, "--format", "hf", "--no-tokenizer"),
    }.get(options, ("convert", folder, "--to", to, "--format", options))
    found = rf"hf: 1 of \d+ elements of {NAME} \(weight\) are NaN or infinite, the first at {3 * 32 + 5}: the model is"
    with pytest.raises(CheckpointError, match=found):
        tritrain(*arguments)
    assert not list(to.rglob("*.safetensors"))
    assert not (to / "config.json").exists()


def start() -> None:
    model = Transformer(variants.MODEL)
    with torch.no_grad():
        model.model.norm.weight[2] = torch.nan
    engine = variants.build("fsdp2 x1", quantized=False)
    with pytest.raises(CheckpointError, match=r"elements of model.norm.weight \(weight\) are NaN or infinite"):
        load_state(ModelSource(model), engine, with_optimizer=False)


def test_no_run_starts_from_weights_that_are_not_finite() -> None:
    run_group(1, start)
