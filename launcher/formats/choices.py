"""The choices of conversion and export. Needs no torch, so that `--help` can list them at once."""

from typing import Literal

from quant.compressed_tensors import InputBits
from quant.gguf import BlockType, Device, EmbeddingType

__all__ = [
    "BlockType",
    "ConvertFormat",
    "Device",
    "Dtype",
    "EmbeddingType",
    "ExportFormat",
    "ExportWeights",
    "InputBits",
    "LinearClass",
    "Runtime",
]

Dtype = Literal["bf16", "fp32"]
"""Of weights that are not codes."""

ConvertFormat = Literal["run", "universal", "hf"]
"""What `tritrain convert` makes: a run, a universal checkpoint of DeepSpeed, or a Hugging Face folder in 16 bits."""

ExportFormat = Literal["hf", "hf-ternary", "compressed-tensors", "mlx", "onnx", "gguf"]
"""What `tritrain export` makes: a Hugging Face folder in 16 bits, with codes for Transformers' BitNet layers, or with
codes in the format of compressed-tensors; a folder for mlx-lm or ONNX Runtime; or a GGUF file."""

ExportWeights = Literal["latent", "dequantized"]
"""Of a ternary phase, in 16 bits: those that it trains, or those that it computes with."""

LinearClass = Literal["bitlinear", "autobitlinear"]
"""What computes with packed codes in Transformers."""

Runtime = Literal["tritrain", "llama.cpp"]
"""What computes the logits of generated text."""
