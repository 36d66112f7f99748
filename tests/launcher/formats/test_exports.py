"""Every source into every target: what is written computes what `load_model` computes, or is refused in a sentence."""

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import ternary_config, write_checkpoint
from gguf_files import narrow, random_model, read_tensors, values_of
from hf_folders import ModelSource, edit_config, pack_folder
from onnx_session import onnx_logits
from safetensors.numpy import load_file
from torch import Tensor, nn

from launcher.commands.convert import convert_checkpoint
from launcher.commands.export import ExportOptions, export_checkpoint
from launcher.errors import UserError
from launcher.formats.deepspeed_universal import UniversalSource, write_universal
from launcher.formats.hf_folder import write_hf
from launcher.inference.load import load_model
from launcher.process.console import Console
from model.gguf import gguf_name, gguf_rows
from model.transformer import ModelConfig, Transformer
from quant.linear import add_learned_scales_, quantize_, quantized_layers, set_strengths_
from quant.packed import PackedLinear

MODEL = narrow("bitnet", num_layers=2, tie_embeddings=True)  # rows that GGUF's ternary types can have

LATENT, DEQUANTIZED = {"into": "hf", "weights": "latent"}, {"into": "hf", "weights": "dequantized"}
TARGETS: dict[str, dict[str, Any]] = {
    "hf": {"into": "hf"},
    "latent": LATENT,
    "dequantized": DEQUANTIZED,
    "bitlinear": {"into": "hf-ternary"},
    "autobitlinear": {"into": "hf-ternary", "linear_class": "autobitlinear"},
    "f16": {"into": "gguf", "block_type": "f16"},
    "q8_0": {"into": "gguf", "block_type": "q8_0"},
    "tq1_0": {"into": "gguf", "block_type": "tq1_0"},
    "tq2_0": {"into": "gguf", "block_type": "tq2_0"},
    "q2_0": {"into": "gguf", "block_type": "q2_0"},
    "compressed": {"into": "compressed-tensors"},
    "onnx": {"into": "onnx", "inputs": "none"},
    "mlx": {"into": "mlx"},  # of the model of SubLN, no source has it
    "convert-hf": {},
    "universal": {},
}
IN_16_BITS = {"hf", "latent", "f16", "q8_0", "convert-hf", "universal"}
ANY_SCALE = {"dequantized", "compressed", "onnx", "f16", "q8_0", "tq1_0", "tq2_0", "q2_0"}
AS_CODES = {*ANY_SCALE, "bitlinear", "autobitlinear"}

BITNET = {"preset": "bitnet-b1.58"}
RUNS: dict[str, dict[str, Any]] = {
    "ternary": BITNET,
    "nielsen": {"preset": "nielsen-2025"},
    "learned": {"preset": "paretoq"},
    "rotated": {"preset": "bitnet-v2"},
    "rows": {"granularity": "row"},
    "some layers": BITNET | {"include": r"mlp\.(up|down)_proj$|layers\.1\."},
    "no layer in a block": BITNET | {"include": r"layers\.1\."},
    "gaussian": {"weights": "gaussian"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online", "modules_to_not_convert": ["lm_head"]},
    "online, a block left out": {
        "linear_class": "autobitlinear", "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head", "model.layers.0"],
    },
}  # fmt: skip
WRITTEN: dict[str, set[str]] = {
    "16-bit": IN_16_BITS,
    "ramp": {"latent", "universal"},
    "ternary": {*AS_CODES, "latent", "convert-hf", "universal"},
    "nielsen": {"latent", "universal"},
    "learned": {*ANY_SCALE, "latent", "universal"},
    "rotated": {"latent", "dequantized", "universal"},
    "rows": {*ANY_SCALE, "latent", "universal"},
    "some layers": {*AS_CODES, "latent", "convert-hf", "universal"},
    "no layer in a block": {*AS_CODES, "latent", "convert-hf", "universal"},
    "gaussian": {*AS_CODES, "latent", "universal"},
    "folder": IN_16_BITS,
    "online": {*AS_CODES, "latent", "convert-hf", "universal"},
    "online, a block left out": {*AS_CODES, "latent", "convert-hf", "universal"},
    "packed for bitlinear": {*AS_CODES, "universal"},
    "packed for autobitlinear": {*AS_CODES, "universal"},
    "DeepSpeed": {"universal"},  # does not say what the model is
}
"""The targets that each source has."""

SHORT = ("ternary", "packed for bitlinear")


def made(config: ModelConfig = MODEL) -> Transformer:
    """A model whose weights bf16 can hold, so that nothing is rounded away."""
    return random_model(config).bfloat16().float()


def make_source(name: str, shards: Path, folder: Path, model_config: ModelConfig = MODEL) -> None:
    model = made(model_config)
    if name in RUNS or name in ("16-bit", "ramp"):
        transition = {"ramp": {"shape": "linear", "steps": 3}} if name == "ramp" else {}
        config = ternary_config(shards, folder, model_config, RUNS.get(name, BITNET), **transition)
        quantization = config.phases[1].quantization
        assert quantization is not None
        if quantization.learned:
            add_learned_scales_(model, quantization)
            quantize_(model, quantization)
        write_checkpoint(config, model, step=4 if name == "16-bit" else 6, phase=0 if name == "16-bit" else 1)
    elif name == "DeepSpeed":
        write_universal(ModelSource(model), folder)
    else:
        write_hf(ModelSource(model), model_config, folder, torch.float32)
        if name in CONFIGS:
            edit_config(folder, quantization_config={"quant_method": "bitnet", **CONFIGS[name]})
        elif name != "folder":
            pack_folder(folder, name.removeprefix("packed for "))


class Unpacked(nn.Linear):
    """A layer with the weights that a packed one computes with, found by asking it for each column."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__(packed.in_features, packed.out_features, bias=False)
        self.weight.data = packed(torch.eye(packed.in_features)).T


def computing_model(folder: Path, *, rounds_inputs: bool) -> Transformer:
    """The model that `load_model` gives, in fp32; also without rounding the inputs of its layers."""
    if rounds_inputs:
        return load_model(folder, dtype=torch.float32).model
    try:
        model = load_model(folder, dtype=torch.float32, packed=False).model
        if layers := quantized_layers(model):
            depth = len(model.model.layers)
            set_strengths_(model, (1.0,) * depth, (0.0,) * depth)
            for layer in layers.values():
                assert layer.weight_strength == 1
                assert layer.activation_strength == 0
    except UserError:  # a packed folder
        model = load_model(folder, dtype=torch.float32).model
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, Unpacked(layer))
    return model


def weights_of(model: Transformer) -> Mapping[str, Tensor]:
    """The weights that a model computes with, if the inputs of its layers are not rounded."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, layer in quantized_layers(model).items():
        with torch.no_grad():
            weights[f"{name}.weight"] = layer(torch.eye(layer.in_features)).T
    return weights


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the first call of Transformers' layers would take minutes
    yield
    del os.environ["TORCHDYNAMO_DISABLE"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(MODEL.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def write(target: str, source: Path, to: Path, shards: Path) -> None:
    if target in ("convert-hf", "universal"):
        convert_checkpoint(
            str(source), to, None, [], Console(silent=True), into="hf" if target == "convert-hf" else "universal",
            phase=None, optimizer=None, dtype=None, dry_run=False, as_json=False,
        )  # fmt: skip
        return
    options: dict[str, Any] = dict.fromkeys(("weights", "linear_class", "block_type", "embeddings", "dtype"))
    options |= TARGETS[target] | {"tokenizer": shards / "tokenizer.model", "no_tokenizer": False}
    if options["into"] not in ("gguf", "onnx"):
        options["dtype"] = "fp32"
    export_checkpoint(str(source), to, ExportOptions(**options), Console(silent=True))


def check_hf(transformers: Any, target: str, source: Path, to: Path, tokens: Tensor) -> None:
    if target == "latent":  # what is trained, by the user's own choice: not what is computed
        model = load_model(to, dtype=torch.float32).model
        latent = dict(made().named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, latent[name]), name
        return
    if target == "compressed" and find_spec("compressed_tensors") is None:
        return
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        to, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    rounds_inputs = target not in ("hf", "dequantized", "compressed")
    expected = computing_model(source, rounds_inputs=rounds_inputs)
    with torch.no_grad():
        ours, theirs = expected(tokens).logits, model.eval()(tokens).logits
    # An input on the edge of two codes may fall to either side, which moves the logits of the tokens that see it.
    tolerance = 2e-2 if rounds_inputs else 1e-5
    assert (ours - theirs).square().mean().sqrt() < tolerance * ours.std(), target


def check_gguf(target: str, source: Path, to: Path) -> None:
    pytest.importorskip("gguf")
    tensors, _ = read_tensors(to)
    for name, weight in weights_of(computing_model(source, rounds_inputs=False)).items():
        if name.endswith("weight_scale"):
            continue
        tensor = tensors[gguf_name(name, MODEL)]
        found = torch.from_numpy(values_of(tensor))
        expected = gguf_rows(weight, name, MODEL)
        coarse = 1 / 200 if tensor.type_number == 8 else 1e-3
        assert (found.view(expected.shape) - expected).abs().max() <= coarse * expected.abs().max(), name


def check_onnx(source: Path, to: Path, tokens: Tensor) -> None:
    expected = computing_model(source, rounds_inputs=False)
    with torch.no_grad():
        ours = expected(tokens).logits
    theirs = onnx_logits(to, MODEL, tokens)
    assert (ours - theirs).square().mean().sqrt() < 1e-5 * ours.std()


def check_universal(name: str, to: Path, source: Path) -> None:
    found = UniversalSource(to)
    if name.startswith("packed"):
        expected = weights_of(computing_model(source, rounds_inputs=False))
    else:
        expected = dict(made().named_parameters())
    for parameter, weight in expected.items():
        value = found.read("weight", parameter, 0, weight.numel()).view(weight.shape)
        assert torch.allclose(value, weight, rtol=1e-6, atol=0), parameter


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow) for name in WRITTEN]
)
def test_a_source_into_every_target(
    transformers: Any, uncompiled: None, shards: Path, tmp_path: Path, tokens: Tensor, name: str
) -> None:
    source = tmp_path / "source"
    make_source(name, shards, source)
    for target, options in TARGETS.items():
        to = tmp_path / target
        if target == "onnx" and (find_spec("onnx") is None or find_spec("onnxruntime") is None):
            continue
        if target not in WRITTEN[name]:
            with pytest.raises(UserError, match=r".{40}"):
                write(target, source, to, shards)
            assert not to.exists()
            continue
        write(target, source, to, shards)
        if options.get("into") == "gguf":
            check_gguf(target, source, to)
        elif target == "onnx":
            check_onnx(source, to, tokens)
        elif target == "universal":
            check_universal(name, to, source)
        else:
            check_hf(transformers, target, source, to, tokens)
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("name", ["ternary", "online", "packed for bitlinear", "packed for autobitlinear"])
def test_a_source_into_mlx(shards: Path, tmp_path: Path, name: str) -> None:
    make_source(name, shards, tmp_path / "source", narrow("llama", num_layers=2))
    write("mlx", tmp_path / "source", tmp_path / "mlx", shards)
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    computed = weights_of(computing_model(tmp_path / "source", rounds_inputs=False))
    assert tensors.keys() - computed.keys() == {
        f"{name.removesuffix('weight')}{part}" for name in computed if "_proj" in name for part in ("scales", "biases")
    }
    for name, weight in computed.items():
        found = tensors[name]
        if found.dtype == np.uint32:
            bits = found[..., None] >> np.arange(0, 32, 2, dtype=np.uint32) & 3
            scales, biases = (tensors[name.removesuffix("weight") + part] for part in ("scales", "biases"))
            groups = bits.reshape(len(found), -1, 128) * scales[..., None] + biases[..., None]
            found = groups.reshape(len(found), -1)
        torch.testing.assert_close(torch.from_numpy(found), weight, rtol=1e-6, atol=1e-9, check_dtype=False)


def test_no_path_of_the_machine_is_in_an_export(shards: Path, tmp_path: Path) -> None:
    make_source("ternary", shards, tmp_path / "source", narrow("llama"))
    for target in TARGETS.keys() - {"hf"} - ({"onnx"} if find_spec("onnx") is None else set()):
        write(target, tmp_path / "source", tmp_path / target, shards)
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_relative_to(tmp_path / "source"):
            content = path.read_bytes()
            for folder in (tmp_path, shards.parent):
                assert str(folder).encode() not in content, path
