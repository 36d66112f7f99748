"""The programs that formats are for compute codes times level, within the bounds that `docs/exporting.md` states."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from coded_folders import ARCHITECTURES, in_columns, lacking, model_of, write
from documented import export_bounds
from exports import exportable, ternary
from gguf_files import narrow, random_model
from models import FAMILIES, build, random_tokens
from onnx_session import onnx_logits
from places import SUPPORT
from program_order import codes_times_level, compressed_logits

from launcher.errors import CheckpointError
from launcher.formats.hf_export import export_hf
from model.config import RopeScalingConfig
from quant.config import QuantConfig
from quant.linear import quantized_layers

BOUNDS = export_bounds()


@pytest.fixture(scope="module")
def transformers(uncompiled_transformers: Any) -> Any:
    return uncompiled_transformers


COMPRESSED: dict[str, dict[str, Any]] = {
    "matrix": {},
    "row": {"granularity": "row"},
    "group": {"granularity": "group", "group_size": 8},
    "part": {"include": r"layers\.1\.mlp\.\w+_proj$"},
}


@pytest.mark.parametrize(
    ("family", "activations"),
    [
        *((family, "int8-127.5") for family in FAMILIES),
        *(pytest.param(family, "none", marks=() if family == "llama" else pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_compressed_tensors_compute_codes_times_level_bit_for_bit(
    transformers: Any, tmp_path: Path, family: str, activations: Any
) -> None:
    model, tokens = build(FAMILIES[family]), random_tokens(3, 17)
    for name, keys in COMPRESSED.items():
        recipe = QuantConfig(activations=activations, **keys)
        write = {"weights": "compressed-tensors", "dtype": torch.float32, "tokenizer": None}
        export_hf(exportable(model, recipe), tmp_path / name, **write)
        found = compressed_logits(transformers, tmp_path / name, tokens, torch.float32)
        with torch.no_grad():
            expected = codes_times_level(model, recipe, rounds=activations != "none")(tokens).logits
            trained = ternary(model, recipe)(tokens).logits
        written = "compressed-tensors" + (" --activations int8" if activations != "none" else "")
        assert (found - expected).abs().max() <= BOUNDS[f"{written}, fp32"] * expected.std(), name
        assert (found - trained).std() < (1e-5 if activations == "none" else 0.02) * trained.std()


def test_compressed_tensors_in_bf16_are_loaded_from_scales_in_fp32(transformers: Any, tmp_path: Path) -> None:
    model, tokens, recipe = build(FAMILIES["llama"]), random_tokens(3, 17), QuantConfig(activations="none")
    export_hf(exportable(model, recipe), tmp_path / "out", weights="compressed-tensors", tokenizer=None)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    found = compressed_logits(transformers, tmp_path / "out", tokens, torch.bfloat16)
    with torch.no_grad():
        trained = ternary(model, recipe)(tokens).logits
    assert (found.float() - trained).std() < 0.02 * trained.std()


def test_inputs_are_rounded_in_the_file_as_in_training_or_by_choice(tmp_path: Path) -> None:
    model = build(FAMILIES["llama"])

    def inputs(activations: Any, **options: Any) -> Any:
        folder = tmp_path / f"{activations}{options}"
        recipe = QuantConfig(activations=activations)
        export_hf(exportable(model, recipe), folder, weights="compressed-tensors", tokenizer=None, **options)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        return config["config_groups"]["group_0"]["input_activations"]

    rounded = {
        "type": "int",
        "symmetric": True,
        "num_bits": 8,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    assert inputs("int8-127.5") == rounded
    assert inputs("int8-127.5", inputs="none") is None
    assert inputs("int8") is None
    assert inputs("int8", inputs="int8") == rounded
    for other in ("none", "int4", "int8-128"):
        assert inputs(other) is None
        with pytest.raises(CheckpointError, match=f"activations {other}: .*leave them in 16 bits with --activations"):
            inputs(other, inputs="int8")


def test_the_grid_of_127_5_is_that_of_compressed_tensors(transformers: Any) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from quant.rounding import quantize_activation

    arguments = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    x_BTI = torch.randn(4, 4096, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 48)
    scale, zero = compute_dynamic_scales_and_zp(x_BTI, arguments, torch.nn.Module())
    codes, found = quantize_activation(x_BTI, "int8-127.5")
    assert torch.equal(found, scale)
    assert torch.equal(codes, quantize(x_BTI, scale, zero, arguments))
    assert codes.min() == -128
    assert codes.max() == 127


MLX: dict[str, QuantConfig] = {
    name: QuantConfig(activations="none", **keys)
    for name, keys in {
        "matrix": {}, "row": {"granularity": "row"}, "group": {"granularity": "group", "group_size": 64},
        "part": {"include": r"layers\.1\.mlp\.\w+_proj$"},
    }.items()
}  # fmt: skip


def test_mlx_computes_codes_times_level(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="pip install mlx mlx-cpu", exc_type=ImportError)
    models = {tmp_path / f"llama {name}": (model_of("llama"), recipe) for name, recipe in MLX.items()}
    for architecture in ARCHITECTURES:
        if lacking("mlx", architecture, "matrix") is None:
            models[tmp_path / architecture] = model_of(architecture), MLX["matrix"]
    for method in ("linear", "llama3", "yarn"):
        length = None if method == "linear" else 16
        scaling = RopeScalingConfig(method=method, factor=4.0, original_max_sequence_length=length)
        model = model_of("llama", rope_theta=100.0, rope_scaling=scaling)
        models[tmp_path / f"llama {method}"] = model, MLX["matrix"]
    for folder, (model, recipe) in models.items():
        write = {"weights": "mlx", "dtype": torch.float32, "tokenizer": None}
        export_hf(exportable(model, recipe), folder, **write)
    tokens = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    command = [sys.executable, SUPPORT / "mlx_client.py", tmp_path / "tokens.npy", tmp_path / "answer.npz", *models]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'mlx_lm'" in done.stderr:
        pytest.skip("pip install --no-deps mlx-lm")
    assert not done.returncode, done.stderr[-3000:]
    answer = np.load(tmp_path / "answer.npz")
    for folder, (model, recipe) in models.items():
        ours = ternary(model, recipe)
        for name, layer in quantized_layers(ours).items():
            codes, level = (each.numpy() for each in layer.weight_codes())
            assert np.array_equal(answer[f"{folder}:{name}"], codes * in_columns(level, layer.in_features)), folder
        with torch.no_grad():
            logits = ours(tokens).logits
        difference = torch.from_numpy(answer[str(folder)]) - logits
        assert difference.abs().max() <= BOUNDS["mlx, fp32"] * logits.std(), folder


ONNX: dict[str, dict[str, Any]] = COMPRESSED | {"group": {"granularity": "group", "group_size": 16}}


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_runtime_computes_codes_times_level(tmp_path: Path, family: str) -> None:
    """At once, in two parts, and behind padding, which changes nothing."""
    pytest.importorskip("onnx", reason="pip install onnx")
    model, tokens = build(replace(FAMILIES[family], intermediate_size=48)), random_tokens(3, 17)
    for name, keys in ONNX.items():
        recipe = QuantConfig(activations="none", **keys)
        write(model, recipe, tmp_path / name, "onnx")
        with torch.no_grad():
            expected, after_padding = (ternary(model, recipe)(each).logits for each in (tokens, tokens[:, 5:]))
        bound = BOUNDS["onnx --activations none"] * expected.std()
        for cut in (None, 9, 16):
            found = onnx_logits(tmp_path / name, model.config, tokens, cut)
            assert (found - expected).abs().max() <= bound, (name, cut)
        found = onnx_logits(tmp_path / name, model.config, tokens, cut=11, padding=5)[:, 5:]
        assert (found - after_padding).abs().max() <= bound, name


def test_onnx_runtime_rounds_inputs_by_blocks(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="pip install onnx")
    model, recipe = random_model(narrow(num_layers=2)), QuantConfig()
    tokens = torch.randint(384, (8, 64), generator=torch.Generator().manual_seed(0))
    write(model, recipe, tmp_path / "out", "onnx")
    with torch.no_grad():
        expected = ternary(model, recipe)(tokens).logits.log_softmax(-1)
    found = onnx_logits(tmp_path / "out", model.config, tokens).log_softmax(-1)
    assert 0 < (expected.exp() * (expected - found)).sum(-1).mean() < BOUNDS["onnx"]
    groups = QuantConfig(granularity="group", group_size=8)
    with pytest.raises(CheckpointError, match="group_size 8: ONNX Runtime has blocks of 16 and its doubles"):
        write(model, groups, tmp_path / "other", "onnx")
