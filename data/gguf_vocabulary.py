"""Write a tokenizer as the vocabulary of a GGUF file; byte-level BPE is in `data.gguf_byte_level`.

llama.cpp's tokenizer `llama`, for SentencePiece models, merges the pair with the best score, as SentencePiece does with
BPE models, and falls back to bytes. It knows neither unigram models nor normalization, so what would be tokenized
differently is refused. One difference is left: a text's own U+2581 is a space to it, as to SentencePiece, where
`data.tokenizer` writes it in bytes.

Programs ask llama.cpp to find the names of special tokens in a prompt, where in training they were just text. It finds
those of control tokens and of the unknown one. `<unk>` and `<s>`, which no text of Tritrain's training became, are
therefore unused tokens here. The token that ends a document must be a control token: llama.cpp makes it one by its
name. A model of another program may have been trained on its control tokens; they stay what they are.

Documents of training begin after the token that ends the one before, so this token is also what llama.cpp is to put in
front of a text.
"""

from pathlib import Path
from typing import Any

from data.errors import DataError
from data.gguf_byte_level import byte_level_vocabulary
from data.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, UNUSED, read_model
from data.tokenizer import load_tokenizer
from data.tokenizer_definition import read_definition
from data.tokenizer_json import bpe_problem


def gguf_vocabulary(
    path: Path,
    num_rows: int,
    *,
    first_token: int | None = None,
    puts_first_token: bool = True,
    has_special: bool = False,
) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a GGUF file.

    Args:
        path: the tokenizer's file.
        num_rows: rows of the embedding; those beyond the tokenizer's vocabulary become unused tokens.
        first_token: what texts begin with; None: the token that ends a document.
        puts_first_token: whether llama.cpp puts it there.
        has_special: whether the model was trained on other control tokens of SentencePiece, too.

    Raises:
        DataError: llama.cpp would tokenize text differently, or the vocabulary is larger than the embedding.
    """
    tokenizer = load_tokenizer(path)
    path, end = tokenizer.path, tokenizer.end_of_document
    if tokenizer.vocab_size > num_rows:
        raise DataError(
            f"{path}: has {tokenizer.vocab_size} tokens, but the model has only {num_rows}; pass its tokenizer"
        )
    first = end if first_token is None else first_token
    if path.suffix == ".model":
        vocabulary = _of_sentencepiece(path, has_special=has_special)
        vocabulary["scores"] += [-1e6] * (num_rows - len(vocabulary["tokens"]))
    else:
        definition = read_definition(path)
        try:
            vocabulary = byte_level_vocabulary(definition)
        except ValueError as error:
            raise DataError(f"{path}: {error}; llama.cpp would not make the same tokens of a text") from error
    tokens, types = vocabulary["tokens"], vocabulary["token_type"]
    for token in (first, end):
        if token >= len(tokens):
            raise DataError(f"{path}: has {len(tokens)} tokens, and {token} is to begin or end texts; name one of them")
        types[token] = CONTROL
    vocabulary["tokens"] = tokens + [unused_name(row) for row in range(len(tokens), num_rows)]
    vocabulary["token_type"] = types + [UNUSED] * (num_rows - len(types))
    return vocabulary | {
        "bos_token_id": first,
        "eos_token_id": end,
        "add_bos_token": puts_first_token,
        "add_eos_token": False,
    }


def _of_sentencepiece(path: Path, *, has_special: bool) -> dict[str, Any]:
    """The keys of a SentencePiece model, without those of single tokens.

    Raises:
        DataError: llama.cpp would tokenize text differently.
    """
    model = read_model(path)
    if problem := bpe_problem(model):
        raise DataError(f"{path}: {problem}; llama.cpp tokenizes as SentencePiece BPE with byte fallback does")
    if merged := _merged_into_special(model):
        raise DataError(f"{path}: llama.cpp would take {merged!r} in a text for the special token of this name")
    without_text = (UNKNOWN,) if has_special else (UNKNOWN, CONTROL)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [UNUSED if piece.type in without_text else int(piece.type) for piece in model.pieces],
        "unknown_token_id": model.trainer_spec.unk_id,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }


def unused_name(row: int) -> str:
    """The name of a row of the embedding beyond the tokenizer's vocabulary."""
    return f"[UNUSED{row}]"


def _merged_into_special(model: Any) -> str | None:
    """The name of a piece that is no text, and which llama.cpp, unlike SentencePiece, merges of two others."""
    normal = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    for name in [piece.piece for piece in model.pieces if piece.type != NORMAL]:
        halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        if any(all(len(half) == 1 or half in normal for half in pair) for pair in halves):
            return name
    return None
