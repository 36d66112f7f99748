"""Write a tokenizer's files for Hugging Face Transformers, with exactly the ids that the model was trained on.

A SentencePiece BPE model with byte fallback becomes a `tokenizer.json` in which

- pieces are spelled with real spaces, so that a text's own U+2581, which SentencePiece takes for a space and which is
  therefore in no piece, is written in bytes, as `data.tokenizer` does;
- nothing splits the text into words first, for SentencePiece merges across a whole text;
- all pairs that make a piece are merges, ordered by the piece's score. SentencePiece joins, of all neighbors whose
  union is a piece, those with the best one.

Transformers' own conversion differs in texts that begin with a space, and turns a unigram model into another model
without a word. A unigram model in a `tokenizer.json` resolves ties in another way than SentencePiece, so it is refused.

Training puts the token that ends a document in front of each, and knows no other special token. It is therefore what
text begins with here: `bos_token`, `eos_token` and `pad_token` in one.

The name of a special token in a text is just text in training, and so here: `<unk>` and `<s>` are ordinary tokens that
no text becomes, and `split_special_tokens` makes Transformers read `</s>` in a text as text. A model that was trained
on chats knows the special tokens that its template writes, and has them here; `generation_config.json` then names all
tokens that end an answer.
"""

import json
import math
from pathlib import Path
from typing import Any

from data.chat_template import ChatTemplate
from data.errors import DataError
from data.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, read_model
from data.tokenizer import SPACE_MARK, load_tokenizer
from data.tokenizer_definition import ENDS_DOCUMENTS, read_definition, special_token_
from data.transformers_files import CHAT_TEMPLATE

UNIGRAM = "is a unigram model, whose choices other libraries do not make exactly"
ADVICE = "; leave the tokenizer out (--no-tokenizer) and encode with SentencePiece"


def tokenizer_files(
    path: Path,
    *,
    vocab_size: int,
    max_sequence_length: int,
    first_token: int | None = None,
    template: ChatTemplate | None = None,
    puts_first_token: bool = True,
) -> dict[str, bytes]:
    """The tokenizer's files in an exported folder, by name; its own file is among them.

    Args:
        path: a SentencePiece model or a `tokenizer.json`.
        vocab_size: the model's; the tokenizer's must fit in.
        max_sequence_length: the model's, in tokens.
        first_token: what texts begin with; None: the token that ends a document.
        template: of the chats that the model was trained on; None: it was trained on text alone.
        puts_first_token: whether Transformers puts that token in front of each text. In training nothing preceded a
            chat.

    Raises:
        DataError: the file cannot be read, its vocabulary is larger than the model's, or `tokenizer.json` cannot
            express it exactly.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: has {tokenizer.vocab_size} tokens, but the model has only {vocab_size}; pass its tokenizer"
        )
    path, end = tokenizer.path, tokenizer.end_of_document
    begin = end if first_token is None else first_token
    if path.suffix == ".model":
        definition, copy = definition_of_sentencepiece(path), {"tokenizer.model": tokenizer.file_content()}
    else:
        definition, copy = read_definition(path), {}
    end_name, begin_name = tokenizer.name_of(end), tokenizer.name_of(begin)
    special, ends = {begin, end}, [end]
    if template is not None:
        special |= set(tokenizer.control_tokens)
        ends = sorted(template.end_tokens())
        copy |= {CHAT_TEMPLATE: template.self_contained().encode()}
    for token in sorted(special):
        special_token_(definition, token)
    for added in definition["added_tokens"]:
        added.pop(ENDS_DOCUMENTS, None)
    if template is not None:
        _check_chats(path, definition, template)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": begin_name, "type_id": 0}}
    begins = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin_name: {"id": begin_name, "ids": [begin], "tokens": [begin_name]}},
    }
    definition["post_processor"] = begins if puts_first_token else None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_name,
        "eos_token": end_name,
        "pad_token": end_name,
        "unk_token": definition["model"].get("unk_token"),
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # In training the name of a special token in a text is just text; in a chat it is the token.
        "split_special_tokens": template is None,
        "model_max_length": max_sequence_length,
    }
    generation = {"bos_token_id": begin, "eos_token_id": ends if len(ends) > 1 else end, "pad_token_id": end}
    return copy | {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def _check_chats(path: Path, definition: dict[str, Any], template: ChatTemplate) -> None:
    """Make sure that a chat becomes the same tokens as in training."""
    import tokenizers

    chat = template.text(
        [{"role": "user", "content": "A question."}, {"role": "assistant", "content": " a"}], to_answer=True
    )
    ids = tokenizers.Tokenizer.from_str(json.dumps(definition)).encode(chat, add_special_tokens=False).ids
    if ids != template.tokenizer.encode_special(chat):
        raise DataError(f"{path}: a `tokenizer.json` would make other tokens of chats than those of training{ADVICE}")


def definition_of_sentencepiece(path: Path) -> dict[str, Any]:
    """A BPE model as a `tokenizer.json`.

    Raises:
        DataError: it is another kind of model, or does what cannot be expressed.
    """
    proto = read_model(path)
    if problem := bpe_problem(proto):
        raise DataError(f"{path}: {problem}; SentencePiece BPE with byte fallback is exported exactly{ADVICE}")
    normalizer = proto.normalizer_spec
    names = [_spelled(piece.piece) if piece.type == NORMAL else piece.piece for piece in proto.pieces]
    scores = {name: piece.score for name, piece in zip(names, proto.pieces, strict=True) if piece.type == NORMAL}
    ids = {name: index for index, name in enumerate(names)}
    merges = [
        (-score, index, name[:cut], name[cut:])
        for index, (name, score) in enumerate(scores.items())
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    unknown = next(name for name, piece in zip(names, proto.pieces, strict=True) if piece.type == UNKNOWN)
    prefix, prefix_end = [], []
    if normalizer.add_dummy_prefix:
        prefix = [{"type": "Prepend", "prepend": " "}]
        prefix_end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],  # `<unk>` and `<s>` stay out: no text becomes them, not even their names
        "normalizer": {"type": "Sequence", "normalizers": prefix} if prefix else None,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *prefix_end]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[left, right] for _, _, left, right in sorted(merges)],
        },
    }


def sentencepiece_problem(path: Path) -> str | None:
    """Why other libraries do not tokenize exactly as a SentencePiece model's file says; None if they do."""
    return bpe_problem(read_model(path))


def bpe_problem(proto: Any) -> str | None:
    """Why a SentencePiece model does more than merge pairs by score and fall back to bytes; None if it does not."""
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != BPE:
        return UNIGRAM
    if sum(piece.type == BYTE for piece in proto.pieces) != 256:
        return "has no pieces for the 256 bytes, so that it loses characters"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"changes texts (normalization {normalizer.name}, remove_extra_whitespaces)"
    if not normalizer.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        return "treats spaces in its own way"
    if others := {piece.type for piece in proto.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        return f"has pieces of kinds {sorted(others)}, user-defined or unused"
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    if SPACE_MARK not in scores:
        return "has no piece for a space, so that it loses spaces"
    merged = [score for name, score in scores.items() if len(name) > 1]
    if len(set(merged)) < len(merged) or not all(map(math.isfinite, merged)):
        return "gives two pieces one score, or one that is no number, so that the order of merges is not known"
    if any(" " in name for name in scores):
        return f"has a piece with a space that is not written {SPACE_MARK}"
    return None


def _spelled(piece: str) -> str:
    return piece.replace(SPACE_MARK, " ")
