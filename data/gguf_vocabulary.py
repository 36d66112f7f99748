"""Write a SentencePiece model as the vocabulary of a GGUF file, for llama.cpp's tokenizer `llama`.

That one merges the pair with the best score, as SentencePiece does with BPE models, and falls back to bytes. It knows
neither unigram models nor normalization, so what would be tokenized differently is refused. One difference is left:
a text's own U+2581 is a space to it, as to SentencePiece, where `data.tokenizer` writes it in bytes.

Documents of training begin after the token that ends the one before, so this token is also what llama.cpp is to put in
front of a text.
"""

from pathlib import Path

from data.errors import DataError
from data.sentencepiece_model import read_model
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
    missing = range(len(model.pieces), num_rows)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces] + [f"[UNUSED{row}]" for row in missing],
        "scores": [piece.score for piece in model.pieces] + [-1e6] * len(missing),
        "token_type": [int(piece.type) for piece in model.pieces] + [UNUSED] * len(missing),
        "bos_token_id": tokenizer.end_of_document,
        "eos_token_id": tokenizer.end_of_document,
        "unknown_token_id": model.trainer_spec.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }
