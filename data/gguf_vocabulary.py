"""Write a SentencePiece model as the vocabulary of a GGUF file, for llama.cpp's tokenizer `llama`.

That one merges the pair with the best score, as SentencePiece does with BPE models, and falls back to bytes. It knows
neither unigram models nor normalization, so what would be tokenized differently is refused. One difference is left:
a text's own U+2581 is a space to it, as to SentencePiece, where `data.tokenizer` writes it in bytes.

Programs ask llama.cpp to find the names of special tokens in a prompt, where in training they were just text. It finds
those of control tokens and of the unknown one. `<unk>` and `<s>`, which no text of training became, are therefore
unused tokens here. The token that ends a document must be a control token: llama.cpp makes it one by its name.

Documents of training begin after the token that ends the one before, so this token is also what llama.cpp is to put in
front of a text.
"""

from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, read_model
from data.tokenizer import load_tokenizer
from data.tokenizer_json import bpe_problem

ONLY_SENTENCEPIECE = "a GGUF file needs a SentencePiece tokenizer, but this one belongs to the `tokenizers` library"
UNUSED = 5
"""Kind of a row of the embedding that no text leads to. The kinds are numbered as in SentencePiece."""


def gguf_vocabulary(path: Path, num_rows: int) -> dict[str, str | int | bool | list[str] | list[float] | list[int]]:
    """The keys `tokenizer.ggml.*` of a GGUF file.

    Args:
        path: the tokenizer's file.
        num_rows: rows of the embedding; those beyond the tokenizer's vocabulary become unused tokens.

    Raises:
        DataError: llama.cpp would tokenize text differently, or the vocabulary is larger than the embedding.
    """
    tokenizer = load_tokenizer(path)
    path = tokenizer.path
    if path.suffix != ".model":
        raise DataError(f"{path}: {ONLY_SENTENCEPIECE}")
    if tokenizer.vocab_size > num_rows:
        raise DataError(
            f"{path}: has {tokenizer.vocab_size} tokens, but the model has only {num_rows}; pass its tokenizer"
        )
    model = read_model(path)
    if problem := bpe_problem(model):
        raise DataError(f"{path}: {problem}; llama.cpp tokenizes as SentencePiece BPE with byte fallback does")
    if merged := _merged_into_special(model):
        raise DataError(f"{path}: llama.cpp would take {merged!r} in a text for the special token of this name")
    missing = range(len(model.pieces), num_rows)
    types = [UNUSED if piece.type in (UNKNOWN, CONTROL) else int(piece.type) for piece in model.pieces]
    types[tokenizer.end_of_document] = CONTROL
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces] + [unused_name(row) for row in missing],
        "scores": [piece.score for piece in model.pieces] + [-1e6] * len(missing),
        "token_type": types + [UNUSED] * len(missing),
        "bos_token_id": tokenizer.end_of_document,
        "eos_token_id": tokenizer.end_of_document,
        "unknown_token_id": model.trainer_spec.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
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
