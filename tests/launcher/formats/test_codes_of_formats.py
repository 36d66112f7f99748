"""Every format holds the codes of training and their levels, bit for bit.

What programs compute from them is in `test_programs_of_formats.py`. Files are taken apart here with numpy, by what the
formats' own documentation says, not with the code that wrote them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_folders import in_columns, lacking, model_of, write
from exports import exportable, ternary
from gguf_files import read_tensors, values_of
from models import FAMILIES, build
from safetensors.numpy import load_file
from stored_codes import READERS, compressed_codes, tensors_of

from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from model.gguf import gguf_name, gguf_rows
from quant.config import PRESETS, QuantConfig
from quant.gguf import TERNARY_TYPES
from quant.linear import quantized_layers

GRANULARITIES: dict[str, QuantConfig] = {
    "matrix": QuantConfig(),
    "fused": QuantConfig(weights="absmedian", fused=True),
    "row": QuantConfig(granularity="row", weights="twn"),
    "group": QuantConfig(granularity="group", group_size=64),
    "wide group": QuantConfig(granularity="group", group_size=256),
    "binary": QuantConfig(levels="binary"),
    "part": QuantConfig(include=r"mlp\.(up|down)_proj$|layers\.1\."),
}
EACH_ONCE = [("llama", granularity) for granularity in GRANULARITIES] + [
    (architecture, "fused") for architecture in ("qwen2", "bitnet", "olmo")
]
OTHERS = [
    pytest.param(architecture, granularity, marks=pytest.mark.slow)
    for architecture in ("qwen2", "bitnet", "olmo")
    for granularity in GRANULARITIES
    if granularity != "fused"
]


@pytest.mark.parametrize(("architecture", "granularity"), EACH_ONCE + OTHERS)
@pytest.mark.parametrize("weights", READERS)
def test_codes_and_levels_in_folders_are_those_of_training(
    tmp_path: Path, weights: Any, architecture: str, granularity: str
) -> None:
    model, recipe = model_of(architecture), GRANULARITIES[granularity]
    if message := lacking(weights, architecture, granularity):
        with pytest.raises(CheckpointError, match=message):
            write(model, recipe, tmp_path / "out", weights)
        assert not list(tmp_path.iterdir())
        return
    write(model, recipe, tmp_path / "out", weights)
    tensors = tensors_of(tmp_path / "out")
    layers = quantized_layers(ternary(model, recipe))
    for name, layer in layers.items():
        codes, level = READERS[weights](tensors, name, layer.in_features)
        expected, trained_level = (each.numpy() for each in layer.weight_codes())
        assert np.array_equal(codes, expected), name
        if weights == "packed":  # stores the reciprocal, which rounds once
            assert np.array_equal(tensors[f"{name}.weight_scale"], 1 / trained_level.reshape(1))
            continue
        dequantized = codes * in_columns(level, layer.in_features)
        assert np.array_equal(dequantized, expected * in_columns(trained_level, layer.in_features)), name
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert np.array_equal(tensors[name], parameter.detach().numpy()), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("into", TERNARY_TYPES)
def test_codes_and_levels_in_gguf_files_are_those_of_training(
    shards: Path, tmp_path: Path, into: Any, granularity: str
) -> None:
    pytest.importorskip("gguf")
    model, recipe = model_of("llama"), GRANULARITIES[granularity]
    write = {"into": into, "tokenizer": shards / "tokenizer.model"}
    if message := lacking(into, "llama", granularity):
        with pytest.raises(CheckpointError, match=message):
            export_gguf(exportable(model, recipe), tmp_path / "out.gguf", **write)
        return
    export_gguf(exportable(model, recipe), tmp_path / "out.gguf", **write)
    tensors, fields = read_tensors(tmp_path / "out.gguf")
    assert fields["general.file_type"] == {"tq2_0": 37, "q2_0": 28, "tq1_0": 36}[into]
    for name, layer in quantized_layers(ternary(model, recipe)).items():
        codes, level = layer.weight_codes()
        in_half = codes * torch.from_numpy(in_columns(level.half().float().numpy(), layer.in_features))
        expected = gguf_rows(in_half, f"{name}.weight", model.config).numpy()
        tensor = tensors[gguf_name(f"{name}.weight", model.config)]
        assert tensor.type_number == {"tq2_0": 35, "q2_0": 42, "tq1_0": 34}[into]
        assert np.array_equal(values_of(tensor), expected), name


def test_rows_that_fill_no_word_are_padded_with_no_bits_set(tmp_path: Path) -> None:
    model = build(FAMILIES["llama"])  # rows of 32 and of 56 weights: two words, and three and a half
    write = {"weights": "compressed-tensors", "dtype": torch.float32, "tokenizer": None}
    export_hf(exportable(model, QuantConfig()), tmp_path / "out", **write)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in quantized_layers(ternary(model, QuantConfig())).items():
        codes, _ = compressed_codes(tensors, name, layer.in_features)
        assert np.array_equal(codes, layer.weight_codes()[0].numpy())
    with pytest.raises(
        CheckpointError, match=r"(?s)down_proj.* rows of 56 weights, and MLX's groups of 32 must divide"
    ):
        export_hf(exportable(model, QuantConfig()), tmp_path / "mlx", weights="mlx", tokenizer=None)


@pytest.mark.parametrize(
    ("widths", "recipe", "size"),
    [
        ({"intermediate_size": 384}, QuantConfig(), 128),
        ({"intermediate_size": 320}, QuantConfig(), 64),
        ({"intermediate_size": 288}, QuantConfig(), 32),
        ({}, QuantConfig(granularity="group", group_size=64), 64),
        ({}, QuantConfig(granularity="group", group_size=256), 128),
    ],
)
def test_mlx_has_the_largest_groups_that_fit(tmp_path: Path, widths: Any, recipe: QuantConfig, size: int) -> None:
    export_hf(exportable(model_of("llama", **widths), recipe), tmp_path / "out", weights="mlx", tokenizer=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": size, "bits": 2, "mode": "affine"}
    assert "quantization_config" not in config


REFUSED: dict[str, tuple[QuantConfig, str]] = {
    "levels": (QuantConfig(levels="int3", weights="absmax"), "levels int3: only -1, 0 and .1 are packed"),
    "hadamard": (PRESETS["bitnet-v2"], "hadamard outputs: packed layers do not rotate"),
    "layer_norm": (PRESETS["nielsen-2025"], "layer_norm true: its layers do not normalize"),
    "dead zone": (QuantConfig(dead_zone_bias=1e-3), "dead_zone_bias 0.001"),
}


@pytest.mark.parametrize("weights", ["compressed-tensors", "mlx", "onnx"])
@pytest.mark.parametrize("reason", REFUSED)
def test_recipes_that_no_product_of_codes_and_levels_computes_are_refused(
    tmp_path: Path, weights: Any, reason: str
) -> None:
    recipe, message = REFUSED[reason]
    with pytest.raises(CheckpointError, match=message):
        write(model_of("llama"), recipe, tmp_path / "out", weights)
    assert not list(tmp_path.iterdir())


def test_models_that_mlx_lm_computes_differently_are_refused(tmp_path: Path) -> None:
    for model, message in (
        (model_of("llama", activation="relu2"), "always computes SiLU and would load a model with activation relu2"),
        (model_of("qwen2", head_dim=32), "qwen2 has no head width of its own: .* is 128 and must be hidden_size 256"),
        (model_of("bitnet", qk_norm="head"), "no Hugging Face family has"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_hf(exportable(model, QuantConfig()), tmp_path / "out", weights="mlx", tokenizer=None)
    groups = QuantConfig(granularity="group", group_size=16)
    with pytest.raises(CheckpointError, match="group_size 16: MLX has groups of 128, 64 and 32"):
        export_hf(exportable(model_of("llama"), groups), tmp_path / "out", weights="mlx", tokenizer=None)
