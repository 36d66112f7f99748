"""The tokenizer in a GGUF file, as a SentencePiece model: undoes `data.gguf_vocabulary`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.gguf_vocabulary import UNUSED, unused_name
from data.sentencepiece_model import BPE, CONTROL, UNKNOWN, ending_documents, parse_model

KINDS = range(UNKNOWN - 1, 7)
"""Kinds of tokens, numbered as in SentencePiece."""


def gguf_tokenizer_file(fields: Mapping[str, Any], folder: Path) -> Path:
    """Write the tokenizer that a file's keys `tokenizer.ggml.*` describe.

    Args:
        fields: the file's keys and values.
        folder: for the tokenizer's file.

    Raises:
        DataError: it is none of SentencePiece's kind, or its keys do not fit together.
    """

    def field(key: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    if field("model") != "llama":
        raise DataError(f"the vocabulary is for the tokenizer {field('model')!r}; only llama (SentencePiece) is read")
    tokens, scores, types = field("tokens"), field("scores"), field("token_type")
    unknown, end = field("unknown_token_id", 0), field("eos_token_id", 2)
    if not all(isinstance(each, list) and len(each) == len(tokens) for each in (tokens, scores, types)):
        raise DataError("the vocabulary needs tokens, scores and token_type of the same length")
    if not all(type(each) in (int, float) for each in (*scores, *types)):
        raise DataError("scores and token_type must be numbers")
    if not all(type(each) is int and 0 <= each < len(tokens) for each in (unknown, end)):
        raise DataError("unknown_token_id or eos_token_id is no token of the vocabulary")
    if unknown == end:
        raise DataError(f"unknown_token_id and eos_token_id are both {end}, so no token ends a text")
    size = len(tokens)  # without rows of the embedding that are no tokens; unused tokens come of no text, as controls
    while size > max(unknown, end) + 1 and tokens[size - 1] == unused_name(size - 1):
        size -= 1
    model = parse_model(b"")
    for place, (token, score, kind) in enumerate(zip(tokens[:size], scores, types, strict=False)):
        kind = UNKNOWN if place == unknown else CONTROL if kind in (UNKNOWN, UNUSED) or kind not in KINDS else kind
        model.pieces.add(piece=str(token), score=float(score), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = BPE, True
    model.trainer_spec.unk_id, model.trainer_spec.unk_piece = unknown, model.pieces[unknown].piece
    model.trainer_spec.vocab_size = size
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(field("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    file = folder / "tokenizer.model"
    file.write_bytes(ending_documents(model.SerializeToString(), end))
    return file
