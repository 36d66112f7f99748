"""A SentencePiece model as the vocabulary of a GGUF file, for llama.cpp's tokenizer of the kind `llama`.

That one merges the pair with the best score, as SentencePiece does with BPE models, and falls back to bytes. It knows
neither unigram models nor normalisation, so what would be tokenized differently is refused.

Documents of training begin behind the token that ends the one before, so this token is also what llama.cpp is to put in
front of a text.
"""

from pathlib import Path

from data.errors import DataError
from data.tokenizer import load_tokenizer

UNUSED = 5
"""Kind of a row of the embedding that no text leads to. The kinds are numbered as in SentencePiece."""


def gguf_vocabulary(path: Path, num_rows: int) -> dict[str, str | int | bool | list[str] | list[float] | list[int]]:
    """The keys `tokenizer.ggml.*` of a GGUF file.

    Args:
        path: the tokenizer's file.
        num_rows: rows of the embedding; those behind the tokenizer's vocabulary become unused tokens.

    Raises:
        DataError: llama.cpp would tokenize text differently; says why.
    """
    if path.suffix != ".model":
        raise DataError(
            f"{path}: GGUF files are written with SentencePiece tokenizers; this one is of the `tokenizers` library"
        )
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    tokenizer = load_tokenizer(path)
    model = ModelProto.FromString(path.read_bytes())
    training, normalizer, kinds = model.trainer_spec, model.normalizer_spec, ModelProto.SentencePiece.Type
    problems = {
        f"is a {TrainerSpec.ModelType.Name(training.model_type).lower()} model, not BPE": (
            training.model_type != TrainerSpec.BPE
        ),
        "has no bytes to fall back to": not training.byte_fallback,
        f"normalises text ({normalizer.name})": bool(normalizer.precompiled_charsmap),
        "removes extra whitespace": normalizer.remove_extra_whitespaces,
        "does not write spaces as a mark": not normalizer.escape_whitespaces,
        "puts spaces behind words": training.treat_whitespace_as_suffix,
        "has symbols defined by the user": any(piece.type == kinds.USER_DEFINED for piece in model.pieces),
    }
    if reasons := [reason for reason, holds in problems.items() if holds]:
        raise DataError(f"{path}: llama.cpp would tokenize text differently: the tokenizer {', '.join(reasons)}")
    missing = range(len(model.pieces), num_rows)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces] + [f"[UNUSED{row}]" for row in missing],
        "scores": [piece.score for piece in model.pieces] + [-1e6] * len(missing),
        "token_type": [int(piece.type) for piece in model.pieces] + [UNUSED] * len(missing),
        "bos_token_id": tokenizer.end_of_document,
        "eos_token_id": tokenizer.end_of_document,
        "unknown_token_id": training.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": normalizer.add_dummy_prefix,
    }
