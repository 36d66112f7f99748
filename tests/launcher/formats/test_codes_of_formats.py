"""Every format holds the codes of training and their levels, bit for bit, and its program computes codes times level.

Files are taken apart here with numpy, by what the formats' own documentation says, not with the code that wrote them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from documented import export_bounds
from exports import exportable, ternary
from gguf_files import narrow, random_model, read_tensors, values_of
from models import FAMILIES, build, random_tokens
from onnx_session import onnx_logits
from places import SUPPORT
from safetensors.numpy import load_file

from data.torchvision_repair import repair_torchvision
from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from model.gguf import gguf_name, gguf_rows
from model.transformer import Transformer
from quant.config import PRESETS, QuantConfig
from quant.gguf import TERNARY_TYPES
from quant.linear import quantized_layers

BOUNDS = export_bounds()

Array = np.ndarray[Any, Any]

GRANULARITIES: dict[str, QuantConfig] = {
    "matrix": QuantConfig(),
    "fused": QuantConfig(weights="absmedian", fused=True),
    "row": QuantConfig(granularity="row", weights="twn"),
    "group": QuantConfig(granularity="group", group_size=64),
    "wide group": QuantConfig(granularity="group", group_size=256),
    "binary": QuantConfig(levels="binary"),
    "part": QuantConfig(include=r"mlp\.(up|down)_proj$|layers\.1\."),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "llama with its own head": {"num_kv_heads": 2, "tie_embeddings": False, "head_dim": 128},
    "qwen2": {},
    "qwen3": {"num_kv_heads": 1, "head_dim": 128},
    "olmo2": {"tie_embeddings": False},
    "olmo": {},
    "bitnet": {},
}


def words_of(words_OW: Array, bits: int = 2) -> Array:
    """Unsigned integers of 2 bits from the low bits of 32-bit words up, [O, 16 W]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words_OW.view(np.uint32)[..., None] >> shifts) & 3).reshape(len(words_OW), -1).astype(np.int64)


def bitnet_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    packed = tensors[f"{name}.weight"]
    return np.concatenate([(packed >> 2 * part & 3).astype(np.int64) - 1 for part in range(4)]), 1 / tensors[
        f"{name}.weight_scale"
    ].reshape(1, 1)


def compressed_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    assert tensors[f"{name}.weight_shape"].tolist() == [len(tensors[f"{name}.weight_packed"]), width]
    assert tensors[f"{name}.weight_packed"].dtype == np.int32
    bits = words_of(tensors[f"{name}.weight_packed"])
    assert not bits[:, width:].any()
    return bits[:, :width] - 2, tensors[f"{name}.weight_scale"]


def mlx_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    assert tensors[f"{name}.weight"].dtype == np.uint32
    scales = tensors[f"{name}.scales"]
    assert np.array_equal(tensors[f"{name}.biases"], -scales)
    return words_of(tensors[f"{name}.weight"]) - 1, scales


def onnx_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    packed = tensors[f"{name}.weight"]
    bits = (packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(packed), -1).astype(np.int64)
    assert not bits[:, width:].any()
    return bits[:, :width] - 2, tensors[f"{name}.weight_scale"]


READERS: dict[str, Callable[[dict[str, Array], str, int], tuple[Array, Array]]] = {
    "packed": bitnet_codes,
    "compressed-tensors": compressed_codes,
    "mlx": mlx_codes,
    "onnx": onnx_codes,
}


def write(model: Transformer, recipe: QuantConfig, folder: Path, weights: Any) -> None:
    """Export in fp32, without a tokenizer."""
    if weights == "onnx":
        pytest.importorskip("onnx", reason="pip install onnx")
        export_onnx(exportable(model, recipe), folder, tokenizer=None)
    else:
        export_hf(exportable(model, recipe), folder, weights=weights, dtype=torch.float32, tokenizer=None)


def tensors_of(folder: Path) -> dict[str, Array]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    import onnx

    onnx.checker.check_model(folder / "model.onnx")
    graph = onnx.load(folder / "model.onnx").graph
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


def lacking(format_name: str, architecture: str, granularity: str) -> str | None:
    """Why a format cannot have a model, a piece of the message; None if it can."""
    if format_name == "packed" and granularity in ("row", "group", "wide group"):
        return "a packed matrix has one scale; --format compressed-tensors holds the codes"
    if format_name == "mlx" and architecture == "olmo":
        return "mlx-lm has other names for the parameters of olmo"
    if format_name == "mlx" and architecture == "bitnet":
        return "mlx-lm's bitnet computes squared ReLU"
    if format_name.startswith("tq") and granularity == "group":
        return "group_size 64: tq._0 has one scale for 256 weights; f16 and q8_0 hold any; q2_0 has blocks of 64"
    return None


def model_of(architecture: str, **changes: Any) -> Transformer:
    family = architecture.split(maxsplit=1)[0]
    return random_model(narrow(family, **{"num_layers": 2, **ARCHITECTURES[architecture]} | changes))


def in_columns(scale: Array, width: int) -> Array:
    return np.repeat(scale, width // scale.shape[1], axis=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "bitnet", "olmo"])
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


# In the programs that read them


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    repair_torchvision()
    yield pytest.importorskip("transformers")
    del os.environ["TORCHDYNAMO_DISABLE"]


class CodesTimesLevel(torch.nn.Module):
    """A quantized layer in Transformers' order: dequantized weights, and inputs as compressed-tensors rounds them."""

    def __init__(self, weight_OI: torch.Tensor, bias: torch.Tensor | None, *, rounds: bool) -> None:
        super().__init__()
        self.weight_OI, self.bias, self.rounds = weight_OI, bias, rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rounds:
            scale = x.abs().amax(-1, keepdim=True) / (255 / 2)
            x = (x / scale).clamp(-128, 127).round() * scale
        return F.linear(x, self.weight_OI, self.bias)


def reference(model: Transformer, recipe: QuantConfig, *, rounds: bool) -> Transformer:
    copy = ternary(model, recipe)
    for name, layer in quantized_layers(copy).items():
        codes, level = layer.weight_codes()
        weight = codes * torch.from_numpy(in_columns(level.numpy(), layer.in_features))
        copy.set_submodule(name, CodesTimesLevel(weight, layer.bias, rounds=rounds))
    return copy


def compressed_logits(transformers: Any, folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors", exc_type=ImportError)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits


COMPRESSED: dict[str, dict[str, Any]] = {
    "matrix": {},
    "row": {"granularity": "row"},
    "group": {"granularity": "group", "group_size": 8},
    "part": {"include": r"layers\.1\.mlp\.\w+_proj$"},
}


@pytest.mark.parametrize("activations", ["none", "int8-127.5"])
@pytest.mark.parametrize("family", FAMILIES)
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
            expected = reference(model, recipe, rounds=activations != "none")(tokens).logits
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
    architectures = [name for name in ARCHITECTURES if lacking("mlx", name, "matrix") is None]
    models = {
        tmp_path / f"{architecture} {name}": (model_of(architecture), recipe)
        for architecture in architectures
        for name, recipe in MLX.items()
    }
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
