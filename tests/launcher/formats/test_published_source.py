"""Exports read back: the same codes, the same logits, and the same bytes when they are exported again."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from coded_folders import in_columns, model_of, write
from command import tritrain
from exports import exportable, model_tree, ternary
from gguf_files import read_tensors
from hf_folders import edit_config
from safetensors.torch import load_file, save_file
from speaking import speaking, write_tokenizer
from tiny import tiny_config

from launcher.checkpoint.manifest import Precision
from launcher.config.file import to_tree
from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from launcher.formats.open import open_source
from launcher.formats.opened import Exportable, open_exportable
from launcher.formats.published_source import PublishedSource
from launcher.inference.load import load_model
from launcher.inference.verdict import SAMPLE
from quant.codes import unpack
from quant.config import QuantConfig
from quant.gguf import TERNARY_TYPES
from quant.linear import quantized_layers
from quant.packed import PackedLinear

RECIPES: dict[str, QuantConfig] = {
    "matrix": QuantConfig(),
    "row": QuantConfig(granularity="row"),
    "64": QuantConfig(granularity="group", group_size=64),
    "256": QuantConfig(granularity="group", group_size=256),
    "binary": QuantConfig(levels="binary"),
    "part": QuantConfig(include=r"mlp\.(up|down)_proj$|layers\.1\."),
    "128 on the other grid": QuantConfig(granularity="group", group_size=128, activations="int8-127.5"),
}
FOLDERS = ("compressed-tensors", "mlx", "onnx")
TOKENS = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))


def weights_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the card and its provenance, which name the source."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md" and "prov" not in path.name
    }


def export_again(opened: Exportable, to: Path, weights: Any) -> None:
    if weights == "onnx":
        export_onnx(opened, to, tokenizer=None)
    else:
        export_hf(opened, to, weights=weights, dtype=torch.float32, tokenizer=None)


@pytest.mark.parametrize(
    "recipe",
    [
        *("matrix", "64", "part", "128 on the other grid"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("row", "256", "binary")),
    ],
)
@pytest.mark.parametrize("weights", FOLDERS)
def test_folders_are_read_back_with_all_their_codes(tmp_path: Path, weights: str, recipe: str) -> None:
    model = model_of("llama with a head" if recipe == "part" else "qwen3")
    write(model, RECIPES[recipe], tmp_path / "first", weights)
    export_again(open_exportable(str(tmp_path / "first"), ternary=True), tmp_path / "second", weights)
    assert weights_in(tmp_path / "first") == weights_in(tmp_path / "second")

    source, layers = open_source(str(tmp_path / "first")), quantized_layers(ternary(model, RECIPES[recipe]))
    loaded = load_model(tmp_path / "first", dtype=torch.float32).model
    assert {name for name, layer in loaded.named_modules() if isinstance(layer, PackedLinear)} == set(layers)
    for name, layer in layers.items():
        codes, level = layer.weight_codes()
        found, found_level = source.packed(f"{name}.weight")
        assert torch.equal(unpack(found), codes)
        values = source.read("weight", f"{name}.weight", 0, codes.numel()).view(codes.shape)
        levels = [torch.from_numpy(in_columns(each.numpy(), codes.shape[1])) for each in (level, found_level)]
        assert torch.equal(values, codes * levels[0])
        assert torch.equal(levels[0].expand_as(codes), levels[1].expand_as(codes))
    activations = {"compressed-tensors": "int8-127.5" if "grid" in recipe else "none", "mlx": "none", "onnx": "int8"}
    computing = replace(RECIPES[recipe], activations=activations[weights])  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(TOKENS).logits, ternary(model, computing)(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("into", TERNARY_TYPES)
@pytest.mark.parametrize("architecture", ["llama", "bitnet", "olmo2"])
def test_gguf_files_are_read_back_with_all_their_codes(
    shards: Path, tmp_path: Path, into: Any, architecture: str
) -> None:
    pytest.importorskip("gguf")
    model, recipe = model_of(architecture), QuantConfig(granularity="group", group_size=256)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export_gguf(exportable(model, recipe), first, into=into, tokenizer=shards / "tokenizer.model", embeddings="f16")
    opened = open_exportable(str(first), ternary=True)
    assert opened.tokenizer is not None
    export_gguf(opened, second, into=into, tokenizer=opened.tokenizer, embeddings="f16")
    (before, fields), (after, again) = read_tensors(first), read_tensors(second)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].data, after[name].data) for name in before)
    assert {key: value for key, value in fields.items() if not key.startswith("general.")} == {
        key: value for key, value in again.items() if not key.startswith("general.")
    }
    loaded = load_model(first, dtype=torch.float32)
    assert loaded.tokenizer is not None
    with torch.no_grad():
        expected = ternary(model, QuantConfig(granularity="group", group_size=256, activations="none"))(TOKENS).logits
        difference = (loaded.model(TOKENS).logits - expected).std()
    assert difference < 2e-3 * expected.std()  # levels and embedding are in half precision


@pytest.mark.parametrize("weights", FOLDERS)
def test_a_run_that_begins_with_an_export_has_its_codes(shards: Path, tmp_path: Path, weights: str) -> None:
    """An `absmedian` quantizer finds codes and scales again where most codes are not 0, and scales are its own."""
    model, recipe = model_of("llama"), QuantConfig(weights="absmedian")
    write(model, recipe, tmp_path / "first", weights)
    phases = [{"precision": "ternary", "steps": 4, "quantization": {"weights": "absmedian"}}]
    config = tiny_config(shards, tmp_path / "run", model=model_tree(model.config), phases=phases)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    arguments = ("--to", tmp_path / "run", "--config", tmp_path / "config.yaml", "--optimizer", "reset")
    said = tritrain("convert", tmp_path / "first", *arguments)
    form = {"compressed-tensors": "Hugging Face folder", "mlx": "MLX folder", "onnx": "ONNX folder"}[weights]
    assert f"The {form} holds no data position" in said
    assert f"The {form} holds packed ternary codes" in said
    opened = open_exportable(str(tmp_path / "run"), ternary=False)
    computing = replace(opened, precision=Precision.full(recipe, model.config.num_layers))
    export_again(computing, tmp_path / "second", weights)
    name = "model.onnx.data" if weights == "onnx" else "model.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_run_begins_with_a_gguf_file_of_its_own_model(shards: Path, tmp_path: Path) -> None:
    """The file holds its numbers in float32, which has no 1e-5."""
    pytest.importorskip("gguf")
    model, file = model_of("llama", norm_eps=1e-5), tmp_path / "first.gguf"
    export_gguf(exportable(model), file, tokenizer=shards / "tokenizer.model")
    phases = [{"precision": "ternary", "steps": 4}]
    config = tiny_config(shards, tmp_path / "run", model=model_tree(model.config), phases=phases)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    arguments = ("--to", tmp_path / "run", "--config", tmp_path / "config.yaml", "--optimizer", "reset")
    said = tritrain("convert", file, *arguments)
    assert "The GGUF file holds no optimizer moments" in said
    assert "The GGUF file holds packed ternary codes" in said


def damaged(folder: Path, **changes: Any) -> Path:
    """A copy of a folder of safetensors with some tensors changed."""
    copy = folder.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name: change(tensors.get(name)) for name, change in changes.items()}, copy / "model.safetensors"
    )
    return copy


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "change", [{"type": "float"}, {"strategy": "tensor"}, {"symmetric": False}, {"dynamic": False}, {"num_bits": 4}]
)
def test_inputs_that_are_rounded_in_another_way_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(model_of("llama"), replace(QuantConfig(), activations="int8-127.5"), tmp_path, "compressed-tensors")
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    open_source(str(tmp_path))
    group = quantization["config_groups"]["group_0"]
    group["input_activations"] |= change
    edit_config(tmp_path, quantization_config=quantization)
    with pytest.raises(CheckpointError, match="rounds inputs of layers in another way than all to 8 bits"):
        open_source(str(tmp_path))
    quantization["config_groups"]["group_1"] = group | {"input_activations": None}
    edit_config(tmp_path, quantization_config=quantization)
    with pytest.raises(CheckpointError, match="rounds inputs of layers in another way"):
        open_source(str(tmp_path))


def test_what_is_wrong_with_an_export_is_an_error(tmp_path: Path) -> None:
    for weights in ("compressed-tensors", "mlx"):
        write(model_of("llama"), QuantConfig(), tmp_path / weights, weights)
    compressed, mlx = tmp_path / "compressed-tensors", tmp_path / "mlx"
    for folder, name, change, message in (
        (compressed, f"{UP}.weight_packed", lambda words: words.fill_(0), "holds codes other than -1, 0 and [+]1"),
        (mlx, f"{UP}.weight", lambda words: torch.full_like(words, 2**32 - 1), "codes other than -1, 0 and [+]1"),
        (compressed, f"{UP}.weight_scale", torch.zeros_like, "the scales of .*up_proj.weight must be positive"),
        (compressed, f"{UP}.weight_scale", lambda scale: scale * torch.nan, "must be positive"),
        (compressed, f"{UP}.weight_packed", lambda words: words[:, :3].clone(), "scale .*shape .256, 256"),
    ):
        with pytest.raises(CheckpointError, match=f"damaged.*{message}"):
            open_source(str(damaged(folder, **{name: change})))
    edit_config(damaged(compressed), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"cannot be read:(?s:.*)9 parameters of the architecture are missing"):
        open_source(str(tmp_path / "damaged"))
    embedding = load_file(compressed / "model.safetensors")["model.embed_tokens.weight"]
    damaged(compressed, **{"lm_head.weight": lambda _: embedding + 1})
    edit_config(tmp_path / "damaged", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_source(str(tmp_path / "damaged"))
    edit_config(damaged(mlx), model_type="falcon_h1")
    with pytest.raises(CheckpointError, match="model_type 'falcon_h1' is not known"):
        open_source(str(tmp_path / "damaged"))


def test_an_onnx_graph_of_others_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "out"
    write(model_of("llama"), QuantConfig(), folder, "onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for change, message in (
        ({"producer_name": "pytorch"}, "was made by 'pytorch'; only graphs that Tritrain wrote are read"),
        ({}, "model.onnx.data: is cut off: "),
    ):
        for key, value in change.items():
            setattr(graph, key, value)
        (folder / "model.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(CheckpointError, match=message):
            open_source(str(folder))
        graph.producer_name = "tritrain"
        os.truncate(folder / "model.onnx.data", 1000)
    [place] = [each for each in graph.graph.initializer if each.name == f"{UP}.weight"]
    place.external_data[0].value = "../elsewhere"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(CheckpointError, match=r"is not in model\.onnx\.data|is cut off"):
        open_source(str(folder))


def test_weights_of_more_bits_are_read_as_weights(tmp_path: Path) -> None:
    """A GGUF file of F16 or Q8_0 is a 16-bit model, whatever values it has."""
    pytest.importorskip("gguf")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.model")
    model = model_of("llama")
    export_gguf(exportable(model), tmp_path / "out.gguf", into="f16", tokenizer=tokenizer)
    source = open_source(str(tmp_path / "out.gguf"))
    assert not source.is_packed
    codes, level = quantized_layers(ternary(model))[UP].weight_codes()
    values = source.read("weight", f"{UP}.weight", 0, codes.numel()).view(codes.shape)
    assert torch.equal(values, codes * level.half().float())


ROUNDED = "Weights in {} are rounded to bf16; --dtype fp32 keeps them."


@pytest.mark.parametrize(
    ("into", "embeddings", "dtype"),
    [("f16", None, "float16"), ("tq2_0", "f16", "float16"), ("tq2_0", "q8_0", None)],
)
def test_weights_of_gguf_files_that_are_rounded_are_said_to_be(
    tmp_path: Path, into: Any, embeddings: Any, dtype: str | None
) -> None:
    pytest.importorskip("gguf")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.model")
    export_gguf(
        exportable(model_of("llama")), tmp_path / "a.gguf", into=into, tokenizer=tokenizer, embeddings=embeddings
    )
    command = ("export", tmp_path / "a.gguf", "--format", "hf", *(("--weights", "dequantized") if embeddings else ()))
    said = tritrain(*command, "--to", tmp_path / "bf16")
    assert "rounded" not in said if dtype is None else ROUNDED.format(dtype) in said
    assert "rounded" not in tritrain(*command, "--to", tmp_path / "fp32", "--dtype", "fp32")


@pytest.mark.parametrize("weights", FOLDERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_of_folders_that_are_rounded_are_said_to_be(tmp_path: Path, weights: str, stored: torch.dtype) -> None:
    write(model_of("llama"), QuantConfig(), tmp_path / "out", weights)
    if weights != "onnx":
        file = tmp_path / "out" / "model.safetensors"
        tensors = load_file(file)
        name = "model.embed_tokens.weight"
        save_file(tensors | {name: tensors[name].to(stored)}, file)
    how = ("--format", "hf", "--weights", "dequantized", "--no-tokenizer")
    said = tritrain("export", tmp_path / "out", "--to", tmp_path / "hf", *how)
    assert ROUNDED.format("float32" if weights == "onnx" else str(stored).removeprefix("torch.")) in said


def test_the_commands_take_exports(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.model")
    model = speaking(tokenizer)
    (tmp_path / "text.txt").write_text(SAMPLE)
    export_hf(exportable(model), tmp_path / "mlx", weights="mlx", dtype=torch.float32, tokenizer=tokenizer)
    export_onnx(exportable(model), tmp_path / "onnx", tokenizer=tokenizer)
    export_gguf(exportable(model), tmp_path / "q2_0.gguf", into="q2_0", tokenizer=tokenizer)
    perplexities = []
    for name in ("mlx", "onnx", "q2_0.gguf"):
        said = tritrain("generate", tmp_path / name, SAMPLE[:200], "--max-tokens", 8, "--temperature", 0)
        assert said.startswith(SAMPLE[:200])
        assert "8 tokens" in said
        measured = json.loads(tritrain("perplexity", tmp_path / name, tmp_path / "text.txt", "--json"))
        perplexities.append(measured["results"][0]["perplexity"])
    assert max(perplexities) < 1.01 * min(perplexities)


def test_a_folder_of_mlx_may_describe_its_codes_twice(tmp_path: Path) -> None:
    """As mlx-lm writes it."""
    write(model_of("llama"), QuantConfig(), tmp_path / "mlx", "mlx")
    once = open_source(str(tmp_path / "mlx"))
    described = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    edit_config(tmp_path / "mlx", quantization_config=described)
    twice = open_source(str(tmp_path / "mlx"))
    assert isinstance(twice, PublishedSource)
    assert (twice.model_config, twice.precision) == (once.model_config, once.precision)
