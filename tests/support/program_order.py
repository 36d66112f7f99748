"""Tritrain's models, computing in the order of operations of other programs, and those programs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coded_folders import in_columns
from exports import ternary

from model.transformer import Transformer
from quant.config import QuantConfig
from quant.linear import quantized_layers


def loaded(transformers: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model, which must have taken every tensor of the folder and lacked none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


class OrderMatched(torch.nn.Module):
    """Tritrain's quantized layer, with Transformers' operations in their order."""

    def __init__(self, codes_OI: torch.Tensor, level: torch.Tensor, bias: torch.Tensor | None, kind: str) -> None:
        super().__init__()
        self.codes_OI, self.level, self.bias, self.kind = codes_OI, level.reshape(1), bias, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if self.kind == "bitlinear" else x.float()
        scale = 127 / wide.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        codes = (wide * scale).round().clamp(-128, 127)
        weight_OI = self.codes_OI.to(x.dtype)
        if self.kind == "bitlinear":
            y = F.linear(codes, weight_OI) / (self.level.reciprocal().to(x.dtype) * scale)
        else:
            y = F.linear((codes / scale).to(x.dtype), weight_OI) * self.level.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def order_matched(model: Transformer, kind: str, dtype: torch.dtype) -> Transformer:
    """Our model, its own operations and weights, with order-matched layers."""
    copy = ternary(model)
    for name, layer in quantized_layers(copy).items():
        copy.set_submodule(name, OrderMatched(*layer.weight_codes(), layer.bias, kind))
    return copy.to(dtype)


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


def codes_times_level(model: Transformer, recipe: QuantConfig, *, rounds: bool) -> Transformer:
    copy = ternary(model, recipe)
    for name, layer in quantized_layers(copy).items():
        codes, level = layer.weight_codes()
        weight = codes * torch.from_numpy(in_columns(level.numpy(), layer.in_features))
        copy.set_submodule(name, CodesTimesLevel(weight, layer.bias, rounds=rounds))
    return copy


def compressed_logits(transformers: Any, folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors", exc_type=ImportError)
    with torch.no_grad():
        logits: torch.Tensor = loaded(transformers, folder, dtype)(tokens).logits
    return logits
