"""The choices of conversion and export. Needs no torch, so that `--help` can list them at once."""

from typing import Literal

from quant.gguf import BlockType, EmbeddingType

__all__ = ["BlockType", "ConvertFormat", "Dtype", "EmbeddingType", "ExportFormat", "ExportWeights", "LinearClass"]

Dtype = Literal["bf16", "fp32"]
"""Of weights that are not codes."""

ConvertFormat = Literal["run", "universal", "hf"]
"""What `tritrain convert` makes: a run, a universal checkpoint of DeepSpeed, or a Hugging Face folder in 16 bits."""

ExportFormat = Literal["hf", "hf-ternary", "gguf"]
"""What `tritrain export` makes: a Hugging Face folder in 16 bits or with packed codes, or a GGUF file."""

ExportWeights = Literal["latent", "dequantized"]
"""Of a ternary phase, in 16 bits: those that it trains, or those that it computes with."""

LinearClass = Literal["bitlinear", "autobitlinear"]
"""What computes with packed codes in Transformers."""
