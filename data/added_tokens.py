"""Add special tokens to a tokenizer: those that a chat template writes and the vocabulary lacks.

They come after the existing tokens, which keep their ids. No text becomes one of them.
"""

import json
from collections.abc import Sequence
from typing import Any

from data.errors import DataError
from data.sentencepiece_model import CONTROL, parse_model
from data.tokenizer import Tokenizer
from data.tokenizer_definition import PLAIN_TOKEN, special_token_, vocabulary
from data.tokenizer_kinds import HuggingFaceTokenizer


def num_new(tokenizer: Tokenizer, names: Sequence[str]) -> int:
    """The number of these names that are not in the vocabulary."""
    there = {tokenizer.name_of(token) for token in range(tokenizer.vocab_size)} if names else set()
    return sum(name not in there for name in names)


def with_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> bytes:
    """The file of a tokenizer with more special tokens.

    A name that is in the vocabulary as text becomes a special token.

    Args:
        tokenizer: that they are added to.
        names: of the tokens, in the order of their ids.

    Raises:
        DataError: one of them is a special token already.
    """
    there = {tokenizer.name_of(token) for token in tokenizer.control_tokens}
    if known := [name for name in names if name in there]:
        raise DataError(f"{tokenizer.path}: {', '.join(known)} is a special token already; do not add it")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        definition: dict[str, Any] = json.loads(json.dumps(tokenizer.definition))
        ids = vocabulary(definition)
        for name in names:
            if name in ids:
                special_token_(definition, ids[name])
            else:
                ids[name] = max(ids.values(), default=-1) + 1
                definition["added_tokens"].append({"id": ids[name], "content": name, **PLAIN_TOKEN, "special": True})
        return json.dumps(definition, ensure_ascii=False).encode()
    model = parse_model(tokenizer.file_content())
    pieces = {piece.piece: piece for piece in model.pieces}
    for name in names:
        if name in pieces:
            pieces[name].type = CONTROL
        else:
            model.pieces.add(piece=name, score=0.0, type=CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString(deterministic=True))
