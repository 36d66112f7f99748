"""GGUF files of random models."""

from pathlib import Path
from typing import Any

import torch

from launcher.formats.gguf_export import export_gguf
from launcher.formats.opened import open_exportable
from model.hf import FAMILIES, TRAITS
from model.transformer import ModelConfig, Transformer
from quant.gguf import TERNARY_TYPES, BlockType


def narrow(family: str = "llama", **changes: Any) -> ModelConfig:
    """The smallest model of a family whose rows are whole blocks."""
    sizes = {
        "vocab_size": 384,
        "hidden_size": 256,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 256,
    }
    return ModelConfig(**sizes | dict(zip(TRAITS, FAMILIES[family], strict=True)) | changes)


def random_model(config: ModelConfig, std: float = 0.05) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model


def export(run: Path, to: Path, into: BlockType = "tq2_0", **options: Any) -> str:
    opened = open_exportable(str(run), ternary=into in TERNARY_TYPES)
    assert opened.tokenizer is not None
    return export_gguf(opened, to, into=into, tokenizer=opened.tokenizer, **options)


def changed(path: Path, section: str, **values: Any) -> Path:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(path.read_bytes())
    for name, value in values.items():
        setattr(getattr(model, section), name, value)
    path.write_bytes(model.SerializeToString())
    return path
