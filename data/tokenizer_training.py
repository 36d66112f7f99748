"""The tokenizer of prepared data: copied, or trained on a sample of the text."""

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.added_tokens import with_tokens
from data.chat_template import ChatTemplate
from data.chats import template_for
from data.config import TRAINED_SPEC, PrepareConfig
from data.documents import uniform
from data.errors import DataError
from data.new_paths import flush
from data.parts import assign_splits
from data.prepared import TRAIN
from data.sentencepiece_model import prefixing_parts
from data.survey import TOKEN_KINDS, Survey, suffix_of
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from data.transformers_files import CHAT_TEMPLATE

TRAINING_SAMPLE_BYTES = 10_000_000  # more text hardly changes a vocabulary
TRAINING_SCAN_BYTES = 1_000_000_000  # where to stop looking for that sample
SAMPLE_PIECE_CHARS = 1 << 16  # one long document is not the whole sample, and one that is all there is gives enough


def copied(
    tokenizer: Tokenizer, out: Path, template: ChatTemplate | None = None, add_tokens: Sequence[str] = ()
) -> Tokenizer:
    """The same tokenizer with its file in a folder, and a chat template beside it; special tokens may be added.

    For chats the file says by itself what other files beside it say of special tokens.
    """
    content = with_tokens(tokenizer, add_tokens) if add_tokens else tokenizer.file_content()
    if template is not None:
        (out / CHAT_TEMPLATE).write_text(template.self_contained(), encoding="utf-8", newline="")
        flush(out / CHAT_TEMPLATE)
        if tokenizer.prefixes_parts:
            content = prefixing_parts(content)
    path = out / f"tokenizer{tokenizer.path.suffix}"
    path.write_bytes(content)
    flush(path)
    return load_tokenizer(path)


def place_tokenizer(config: PrepareConfig, files: Survey, out: Path) -> Tokenizer:
    """Put the tokenizer that is asked for into a folder; train it if it is one to be trained.

    Raises:
        DataError: it cannot be read or trained.
    """
    if not TRAINED_SPEC.fullmatch(config.tokenizer):
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
        template = None if config.content == "text" else template_for(config, tokenizer)
        return copied(tokenizer, out, template, config.add_tokens)
    if tokens := [path for path in files.read if suffix_of(path) in TOKEN_KINDS]:
        raise DataError(f"{tokens[0]}: holds tokens, not text to train a tokenizer on; name the one that made it")
    texts = (
        block for split, _, document in assign_splits(config, files) if split == TRAIN for block in document.blocks()
    )
    path = out / "tokenizer.model"
    train_tokenizer(sample_texts(texts), config.tokenizer, path)
    flush(path)
    tokenizer = load_tokenizer(path)
    return copied(tokenizer, out, None, config.add_tokens) if config.add_tokens else tokenizer


def sample_texts(texts: Iterable[str]) -> list[str]:
    """Return a random sample of at most `TRAINING_SAMPLE_BYTES`, of long texts in pieces.

    It looks at the first `TRAINING_SCAN_BYTES` and keeps the pieces with the smallest hashes, as many as fit: every
    machine draws the same sample, in whatever order it reads the texts.
    """
    kept: list[tuple[float, str]] = []  # a heap with the largest hash on top, as its negative
    kept_bytes = scanned_bytes = 0
    limit = 1.0  # the smallest hash that did not fit
    for text in texts:
        for begin in range(0, len(text), SAMPLE_PIECE_CHARS):
            piece = text[begin : begin + SAMPLE_PIECE_CHARS]
            num_bytes = len(piece.encode())
            scanned_bytes += num_bytes
            if (key := uniform([piece.encode()])) < limit:
                heapq.heappush(kept, (-key, piece))
                kept_bytes += num_bytes
            while kept_bytes > TRAINING_SAMPLE_BYTES:
                negative_key, dropped = heapq.heappop(kept)
                limit = -negative_key
                kept_bytes -= len(dropped.encode())
        if scanned_bytes > TRAINING_SCAN_BYTES:
            break
    return [piece for _, piece in sorted(kept)]
