"""GGUF files of random models."""

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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


class StoredTensor(NamedTuple):
    """A tensor of a GGUF file."""

    type_number: int
    shape: tuple[int, ...]
    data: np.ndarray
    """Bytes [rows, bytes of a row]."""


BYTES_OF_64 = {0: 256, 1: 128, 8: 68, 34: 13.5, 35: 16.5, 42: 18}
"""Bytes of 64 weights, by the number of the type: F32, F16, Q8_0, TQ1_0, TQ2_0 and Q2_0."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors and the fields of a file, by the specification; `gguf` 0.19 does not read Q2_0."""
    content, at = path.read_bytes(), 24

    def scalar(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", content, at)
        at += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal at
        length = scalar("Q")
        at += length
        return content[at - length : at].decode(errors="replace")

    def value(kind: int) -> Any:
        if kind == 9:
            of, length = scalar("I"), scalar("Q")
            return [value(of) for _ in range(length)]
        return text() if kind == 8 else scalar(SCALARS[kind])

    num_tensors, num_fields = struct.unpack_from("<QQ", content, 8)
    fields = {text(): value(scalar("I")) for _ in range(num_fields)}
    infos = {}
    for _ in range(num_tensors):
        name = text()
        shape = tuple(reversed([scalar("Q") for _ in range(scalar("I"))]))
        infos[name] = scalar("I"), shape, scalar("Q")
    base = -(-at // 32) * 32
    tensors = {}
    for name, (number, shape, offset) in infos.items():
        rows = prod(shape[:-1])
        length = int(prod(shape) * BYTES_OF_64[number] / 64)
        data = np.frombuffer(content, np.uint8, length, base + offset).reshape(rows, -1)
        tensors[name] = StoredTensor(number, shape, data)
    return tensors, fields


def values_of(tensor: StoredTensor) -> np.ndarray:
    """The weights that a tensor stands for, fp32 [rows, weights of a row]."""
    if tensor.type_number != 42:
        import gguf

        stored = tensor.data.view({0: np.float32, 1: np.float16}.get(tensor.type_number, np.uint8))
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(tensor.type_number)).astype(np.float32)
    blocks = tensor.data.reshape(len(tensor.data), -1, 18)
    codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.float32) - 1
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    return (codes.reshape(*blocks.shape[:2], 64) * scale).reshape(len(tensor.data), -1)


def changed(path: Path, section: str, **values: Any) -> Path:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(path.read_bytes())
    for name, value in values.items():
        setattr(getattr(model, section), name, value)
    path.write_bytes(model.SerializeToString())
    return path
