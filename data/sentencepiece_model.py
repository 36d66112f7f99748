"""The protocol buffer that a SentencePiece model's file holds."""

from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, as numbered in SentencePiece's `sentencepiece_model.proto`."""
BPE = 2
"""Its model type, likewise."""
PREFIXES_PARTS = 200
"""Number of a field that SentencePiece leaves to others, for `prefixing_parts`."""


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


def prefixing_parts(content: bytes) -> bytes:
    """A model whose file says that the dummy prefix comes after special tokens too, which others say beside it."""
    if does_prefix_parts(content):
        return content
    return content + bytes([PREFIXES_PARTS << 3 & 0x7F | 0x80, PREFIXES_PARTS >> 4, 1])  # a field of one number, 1


def does_prefix_parts(content: bytes) -> bool:
    """Return whether a model is one of `prefixing_parts`."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    return any(field.field_number == PREFIXES_PARTS for field in UnknownFieldSet(parse_model(content)))


def without_dummy_prefix(content: bytes) -> bytes:
    """A model that puts no space in front of a text, or after it."""
    model = parse_model(content)
    model.normalizer_spec.add_dummy_prefix = False
    return bytes(model.SerializeToString(deterministic=True))
