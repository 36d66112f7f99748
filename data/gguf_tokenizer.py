"""The tokenizer in a GGUF file, as a file of its own: undoes `data.gguf_vocabulary`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.gguf_byte_level import byte_level_definition
from data.gguf_vocabulary import unused_name
from data.sentencepiece_model import BPE, CONTROL, UNKNOWN, UNUSED, ending_documents, parse_model
from data.tokenizer_definition import ENDS_DOCUMENTS, special_token_
from data.transformers_files import CHAT_TEMPLATE, GENERATION_CONFIG, SPECIAL_TOKENS

KINDS = range(UNKNOWN - 1, 7)
"""Kinds of tokens, numbered as in SentencePiece."""


def gguf_tokenizer_file(fields: Mapping[str, Any], folder: Path) -> Path:
    """Write the tokenizer that a file's keys `tokenizer.ggml.*` describe, with its chat template and what that needs.

    Args:
        fields: the file's keys and values.
        folder: for the tokenizer's file.

    Raises:
        DataError: it is of a kind that is not read, or its keys do not fit together.
    """

    def field(key: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    kind, tokens, types = field("model"), field("tokens"), field("token_type")
    scores = field("scores") if kind == "llama" else types
    unknown, end = field("unknown_token_id", 0 if kind == "llama" else None), field("eos_token_id", 2)
    if kind not in ("llama", "gpt2"):
        raise DataError(f"the vocabulary is for the tokenizer {kind!r}; llama (SentencePiece) and gpt2 (BPE) are read")
    if not all(isinstance(each, list) and len(each) == len(tokens) for each in (tokens, scores, types)):
        raise DataError("the vocabulary needs tokens, scores and token_type of the same length")
    if not all(type(each) in (int, float) for each in (*scores, *types)):
        raise DataError("scores and token_type must be numbers")
    named = [end] if unknown is None else [unknown, end]
    if not all(type(each) is int and 0 <= each < len(tokens) for each in named):
        raise DataError("unknown_token_id or eos_token_id is no token of the vocabulary")
    if unknown == end:
        raise DataError(f"unknown_token_id and eos_token_id are both {end}, so no token ends a text")
    size = len(tokens)  # without rows of the embedding that are no tokens; unused tokens come of no text, as controls
    while size > max(named) + 1 and tokens[size - 1] == unused_name(size - 1):
        size -= 1
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        ids = {f"{key}_token": field(f"{key}_token_id") for key in ("bos", "eos")}
        names = {key: str(tokens[id_]) for key, id_ in ids.items() if type(id_) is int and 0 <= id_ < len(tokens)}
        (folder / SPECIAL_TOKENS).write_text(json.dumps(names))
        ends = [id_ for id_ in (end, field("eot_token_id")) if type(id_) is int]
        (folder / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ends}))
    if kind == "gpt2":
        merges = field("merges", [])
        if not isinstance(merges, list) or not all(isinstance(each, str) and " " in each for each in merges):
            raise DataError("the vocabulary needs merges, pairs of tokens with a space between them")
        definition = byte_level_definition(field("pre"), tokens, merges, types, size)
        special_token_(definition, end)[ENDS_DOCUMENTS] = True
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
        return file
    model = parse_model(b"")
    for place, (token, score, type_) in enumerate(zip(tokens[:size], scores, types, strict=False)):
        type_ = UNKNOWN if place == unknown else CONTROL if type_ in (UNKNOWN, UNUSED) or type_ not in KINDS else type_
        model.pieces.add(piece=str(token), score=float(score), type=type_)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = BPE, True
    model.trainer_spec.unk_id, model.trainer_spec.unk_piece = unknown, model.pieces[unknown].piece
    model.trainer_spec.vocab_size = size
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(field("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    file = folder / "tokenizer.model"
    file.write_bytes(ending_documents(model.SerializeToString(), end))
    return file
