"""Models of every architecture, written in every format of folders that holds codes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import exportable
from gguf_files import narrow, random_model

from launcher.formats.hf_export import export_hf
from launcher.formats.onnx_export import export_onnx
from model.transformer import Transformer
from quant.config import QuantConfig

Array = np.ndarray[Any, Any]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "llama with a head": {"num_kv_heads": 2, "tie_embeddings": False, "head_dim": 128},
    "qwen2": {},
    "qwen3": {"num_kv_heads": 1, "head_dim": 128},
    "olmo2": {"tie_embeddings": False},
    "olmo": {},
    "bitnet": {},
    "bitnet with squared ReLU": {"activation": "relu2"},
}


def model_of(architecture: str, **changes: Any) -> Transformer:
    family = architecture.split(maxsplit=1)[0]
    return random_model(narrow(family, **{"num_layers": 2, **ARCHITECTURES[architecture]} | changes))


def in_columns(scale: Array, width: int) -> Array:
    return np.repeat(scale, width // scale.shape[1], axis=1)


def write(model: Transformer, recipe: QuantConfig, folder: Path, weights: Any) -> None:
    """Export in fp32, without a tokenizer."""
    if weights == "onnx":
        pytest.importorskip("onnx", reason="pip install onnx")
        export_onnx(exportable(model, recipe), folder, tokenizer=None)
    else:
        export_hf(exportable(model, recipe), folder, weights=weights, dtype=torch.float32, tokenizer=None)


def lacking(format_name: str, architecture: str, granularity: str) -> str | None:
    """Why a format cannot have a model, a piece of the message; None if it can."""
    if format_name == "packed" and granularity in ("row", "group", "wide group"):
        return "a packed matrix has one scale; --format compressed-tensors holds the codes"
    if format_name == "mlx" and architecture == "olmo":
        return "mlx-lm has other names for the parameters of olmo"
    if format_name == "mlx" and architecture.startswith("bitnet"):
        return "mlx-lm's bitnet computes squared ReLU"
    if format_name.startswith("tq") and granularity == "group":
        return "group_size 64: tq._0 has one scale for 256 weights; f16 and q8_0 hold any; q2_0 has blocks of 64"
    return None
