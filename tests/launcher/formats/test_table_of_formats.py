"""The table of `docs/exporting.md`: codes, levels and logits of every format, architecture and granularity of scales.

Logits are compared with those of codes times level, in the program's order of operations where it has an exact one.
Where a program is not installed, its logits on the page are left as they are.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coded_folders import ARCHITECTURES, Array, in_columns, model_of
from exports import exportable, ternary
from generated_tables import NOT_RUN, GeneratedTable, Measured, Rows
from gguf_files import read_tensors, values_of
from onnx_session import onnx_logits
from places import ROOT, SUPPORT
from program_order import codes_times_level, compressed_logits, loaded, order_matched
from stored_codes import READERS, tensors_of

from launcher.errors import CheckpointError
from launcher.formats.gguf_export import export_gguf
from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from model.gguf import gguf_name, gguf_rows
from model.transformer import Transformer
from quant.config import QuantConfig
from quant.gguf import TERNARY_TYPES
from quant.linear import quantized_layers

SCALES = {
    "matrix": {},
    "row": {"granularity": "row"},
    "64 weights": {"granularity": "group", "group_size": 64},
    "256 weights": {"granularity": "group", "group_size": 256},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "`hf-ternary`": ("packed", {"linear_class": "bitlinear"}),
    "`hf-ternary --linear-class autobitlinear`": ("packed", {"linear_class": "autobitlinear"}),
    "`compressed-tensors`": ("compressed-tensors", {"inputs": "none"}),
    "`compressed-tensors --activations int8`": ("compressed-tensors", {"inputs": "int8"}),
    "`mlx`": ("mlx", {}),
    "`onnx --activations none`": ("onnx", {"inputs": "none"}),
    "`onnx`": ("onnx", {"inputs": "int8"}),
} | {f"`gguf --type {into}`": ("gguf", {"into": into}) for into in TERNARY_TYPES}
"""Options of `tritrain export`, and their meaning."""

CODES, WEIGHTS = "codes that differ", "weights off by"
TABLE = GeneratedTable(
    ROOT / "docs" / "exporting.md",
    "tests/launcher/formats/test_table_of_formats.py",
    ("`--format`", "a scale for"),
    [CODES, WEIGHTS, *ARCHITECTURES],
)
ORDER = [(written, scale) for written in OPTIONS for scale in SCALES if "gguf" in written or scale != "256 weights"]
TOKENS = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))

Logits = Callable[[list[Path]], list[torch.Tensor]]
"""Computes folders or files; raises `pytest.skip.Exception` where the program is missing."""


def small(architecture: str) -> Transformer:
    return model_of(architecture, num_layers=1)


def recipe_of(written: str, scale: str) -> QuantConfig:
    """With 8-bit inputs, on the grid of the format's programs."""
    activations = "int8-127.5" if OPTIONS[written][0] == "compressed-tensors" else "int8"
    return QuantConfig(**SCALES[scale], activations=activations)  # type: ignore[arg-type]


def write(model: Transformer, recipe: QuantConfig, written: str, to: Path, tokenizer: Path) -> None:
    kind, options = OPTIONS[written]
    opened = exportable(model, recipe)
    if kind == "gguf":
        pytest.importorskip("gguf")
        export_gguf(opened, to, tokenizer=tokenizer, embeddings="f16", **options)
    elif kind == "onnx":
        pytest.importorskip("onnx", reason="pip install onnx")
        export_onnx(opened, to, tokenizer=None, **options)
    else:
        export_hf(opened, to, weights=kind, dtype=torch.float32, tokenizer=None, **options)  # type: ignore[arg-type]


def reason(error: CheckpointError) -> str:
    """Why a format cannot have a model, a line for each reason, without its place."""
    first, *others = str(error).splitlines()
    if others:
        return "\n".join(line.strip() for line in others)
    return re.split(r"cannot be written as \w+: ", first)[-1]


def stored_weights(written: str, to: Path, model: Transformer, recipe: QuantConfig) -> tuple[int, float]:
    """How many codes in a file are none of training's, and how far weights are off, relative to their level."""
    differing, furthest = 0, 0.0
    tensors = read_tensors(to)[0] if to.is_file() else tensors_of(to)
    for name, layer in quantized_layers(ternary(model, recipe)).items():
        codes, level = (each.numpy() for each in layer.weight_codes())
        levels = in_columns(level, layer.in_features) + np.zeros_like(codes, np.float32)
        if to.is_file():
            rows = partial(gguf_rows, name=f"{name}.weight", config=model.config)
            codes, levels = (rows(torch.from_numpy(each)).numpy() for each in (codes, levels))
            weights = values_of(tensors[gguf_name(f"{name}.weight", model.config)])
            found: Array = np.sign(weights)
        else:
            found, scale = READERS[OPTIONS[written][0]](tensors, name, layer.in_features)
            if OPTIONS[written][1].get("linear_class") == "autobitlinear":
                scale = tensors[f"{name}.weight_scale"].reshape(1, 1)
            weights = found * in_columns(scale, layer.in_features)
        differing += int((found != codes).sum())
        furthest = max(furthest, float((abs(weights - codes * levels) / levels).max()))
    return differing, furthest


def expected_logits(written: str, model: Transformer, recipe: QuantConfig) -> torch.Tensor:
    """Of codes times level: for Transformers, with its order of operations; for other programs, inputs not rounded."""
    kind, options = OPTIONS[written]
    if kind == "packed":
        reference = order_matched(model, options["linear_class"], torch.float32)
    else:
        reference = codes_times_level(model, recipe, rounds=options.get("inputs") == "int8" and kind != "onnx")
    with torch.no_grad():
        logits: torch.Tensor = reference(TOKENS).logits
    return logits


def fill(written: str, folder: Path, tokenizer: Path, compute: Logits) -> None:
    """Write all models of a row, look into the files, compute them, and compare the row with the page."""
    rows: Rows = {}
    places: dict[tuple[str, str], Path] = {}
    for scale in [scale for each, scale in ORDER if each == written]:
        recipe, differing, furthest = recipe_of(written, scale), 0, 0.0
        rows[written, scale] = cells = {}
        for number, architecture in enumerate(ARCHITECTURES):
            model, to = small(architecture), folder / f"{number}-{scale.split()[0]}"
            try:
                write(model, recipe, written, to, tokenizer)
            except CheckpointError as error:
                cells[architecture] = reason(error)
                continue
            places[scale, architecture], cells[architecture] = to, NOT_RUN
            counted = stored_weights(written, to, model, recipe)
            differing, furthest = differing + counted[0], max(furthest, counted[1])
        written_any = any(place == scale for place, _ in places)
        cells |= {CODES: str(differing), WEIGHTS: Measured(furthest)} if written_any else {CODES: "-", WEIGHTS: "-"}
    try:
        logits = compute([*places.values()])
    except pytest.skip.Exception as error:
        print(f"{written}: {error}; its logits were not compared")  # noqa: T201
        logits = []
    for (scale, architecture), found in zip(places, logits, strict=False):
        expected = expected_logits(written, small(architecture), recipe_of(written, scale))
        furthest = float((found - expected).abs().max() / expected.std())
        rows[written, scale][architecture] = Measured(furthest)
    TABLE.check(rows, ORDER)


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(name, marks=pytest.mark.slow if "--activations" in name else ())
        for name in OPTIONS
        if name[1:].startswith(("hf", "compressed"))
    ],
)
def test_golden_table_in_transformers(uncompiled_transformers: Any, shards: Path, tmp_path: Path, written: str) -> None:
    run = compressed_logits if OPTIONS[written][0] == "compressed-tensors" else packed_logits

    def compute(folders: list[Path]) -> list[torch.Tensor]:
        return [run(uncompiled_transformers, folder, TOKENS, torch.float32) for folder in folders]

    fill(written, tmp_path, shards / "tokenizer.model", compute)


def packed_logits(transformers: Any, folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pytest.importorskip("accelerate")
    with torch.no_grad():
        logits: torch.Tensor = loaded(transformers, folder, dtype)(tokens).logits
    return logits


def test_golden_table_in_mlx(shards: Path, tmp_path: Path) -> None:
    def compute(folders: list[Path]) -> list[torch.Tensor]:
        pytest.importorskip("mlx.core", reason="pip install mlx mlx-cpu", exc_type=ImportError)
        if not find_spec("mlx_lm"):
            pytest.skip("pip install --no-deps mlx-lm")
        np.save(tmp_path / "tokens.npy", TOKENS.numpy())
        arguments = [tmp_path / "tokens.npy", tmp_path / "answer.npz", *folders]
        subprocess.run([sys.executable, SUPPORT / "mlx_client.py", *arguments], check=True, capture_output=True)
        answer = np.load(tmp_path / "answer.npz")
        return [torch.from_numpy(answer[str(folder)]) for folder in folders]

    fill("`mlx`", tmp_path, shards / "tokenizer.model", compute)


@pytest.mark.parametrize("written", ["`onnx`", pytest.param("`onnx --activations none`", marks=pytest.mark.slow)])
def test_golden_table_in_onnx_runtime(shards: Path, tmp_path: Path, written: str) -> None:
    def compute(folders: list[Path]) -> list[torch.Tensor]:
        models = [small([*ARCHITECTURES][int(folder.name.partition("-")[0])]) for folder in folders]
        return [onnx_logits(folder, model.config, TOKENS) for folder, model in zip(folders, models, strict=True)]

    fill(written, tmp_path, shards / "tokenizer.model", compute)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("into", TERNARY_TYPES)
def test_golden_table_in_llama_cpp(ask: Any, shards: Path, tmp_path: Path, into: str) -> None:
    def compute(files: list[Path]) -> list[torch.Tensor]:
        return [torch.from_numpy(ask(file, sequences=TOKENS.tolist())["logits"]) for file in files]

    fill(f"`gguf --type {into}`", tmp_path, shards / "tokenizer.model", compute)


@pytest.mark.parametrize(
    "into", [pytest.param(into, marks=() if into == "tq2_0" else pytest.mark.slow) for into in TERNARY_TYPES]
)
def test_golden_table_of_gguf_without_its_logits(shards: Path, tmp_path: Path, into: str) -> None:
    fill(f"`gguf --type {into}`", tmp_path, shards / "tokenizer.model", lambda files: [])
