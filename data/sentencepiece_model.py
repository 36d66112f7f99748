"""The protocol buffer that a SentencePiece model's file holds."""

from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, as numbered in SentencePiece's `sentencepiece_model.proto`."""
BPE = 2
"""Its model type, likewise."""


def read_model(path: Path) -> Any:
    """The protocol buffer in a file."""
    return parse_model(path.read_bytes())


def parse_model(content: bytes) -> Any:
    """The protocol buffer in a file's content."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]


def ending_documents(content: bytes, token: int) -> bytes:
    """A model whose end-of-sentence piece is `token`, and in which no text becomes that piece."""
    model = parse_model(content)
    model.trainer_spec.eos_piece = model.pieces[token].piece
    model.pieces[token].type = CONTROL
    return bytes(model.SerializeToString(deterministic=True))


def without_dummy_prefix(content: bytes) -> bytes:
    """A model that puts no space in front of a text, or after it."""
    model = parse_model(content)
    model.normalizer_spec.add_dummy_prefix = False
    return bytes(model.SerializeToString(deterministic=True))
