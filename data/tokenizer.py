"""Turn text into token ids and back, and count the bytes of text that each token stands for.

Two kinds of file are read: SentencePiece models (`*.model`) and Hugging Face tokenizers (`*.json`). New ones are
trained with SentencePiece so that they lose nothing: identity normalization, no dummy prefix, no whitespace removed,
and bytes for what the vocabulary lacks (newline and tab among them), hence `decode(encode(text)) == text` for any text.
The counts of `token_bytes` turn a loss in nats per token into bits per byte, which compares across vocabularies.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.config import TRAINED_SPEC
from data.errors import DataError
from data.pointers import pointer_problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

END_OF_DOCUMENT_NAMES = (
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<|end▁of▁sentence|>",
)  # fmt: skip
"""Names under which published tokenizers keep the token that ends a document, most common first."""

NUM_TRAINING_THREADS = 4  # part of the result for unigram, whose sums depend on how the text was divided
MAX_TRAINING_LINE_CHARS = 4000
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so a literal one needs care


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    path: Path
    vocab_size: int
    end_of_document: int
    """Id of the token that follows each document."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding any special token; the name of one in the text is just text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode` gives for each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        ...

    def token_bytes(self) -> "NDArray[np.int32]":
        """Return the number of UTF-8 bytes that each token stands for, shape [vocab_size]; 0 for special tokens.

        For a tokenizer trained here the sum over `encode(text)` is `len(text.encode())` exactly.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokenizer's file, in hexadecimal digits."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a SentencePiece model, a `tokenizer.json`, or a folder that holds one of them.

    Raises:
        DataError: there is no such file, it is of neither kind, or no token of it ends a document.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: has neither tokenizer.model nor tokenizer.json")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; name a SentencePiece .model, a tokenizer.json or bpe:VOCAB")
    if problem := pointer_problem(path):
        raise DataError(f"{path}: {problem}")
    if path.suffix == ".model":
        return _SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return _HuggingFaceTokenizer(path)
    raise DataError(f"{path}: must be a SentencePiece .model or a Hugging Face .json file, not {path.suffix!r}")


class _FileFingerprint:
    path: Path

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


class _SentencePieceTokenizer(_FileFingerprint):
    """A SentencePiece model; see `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._model.vocab_size()
        self.end_of_document: int = self._model.eos_id()
        if self.end_of_document < 0:
            raise DataError(f"{path}: has no end-of-sentence token; train it with eos_id, or name another")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark if all(self._model.is_byte(i) for i in mark) else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark_ids is None or not any(SPACE_MARK in text for text in texts):
            return self._model.encode(texts, num_threads=1)
        return [self._encode_around_marks(text) for text in texts]

    def _encode_around_marks(self, text: str) -> list[int]:
        """Write each literal space mark as its bytes: SentencePiece itself would read it as a space."""
        first, *others = self._model.encode(text.split(SPACE_MARK), num_threads=1)
        for part in others:
            first += self._mark_ids
            first += part
        return first

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def token_bytes(self) -> "NDArray[np.int32]":
        import numpy as np

        sizes = np.zeros(self.vocab_size, np.int32)
        for token, piece in enumerate(self._model.id_to_piece(list(range(self.vocab_size)))):
            if self._model.is_byte(token):
                sizes[token] = 1
            elif not (self._model.is_control(token) or self._model.is_unknown(token)):
                sizes[token] = len(piece.replace(SPACE_MARK, " ").encode())
        return sizes


class _HuggingFaceTokenizer(_FileFingerprint):
    """A `tokenizer.json`, read by the `tokenizers` library; see `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        # One process is one worker: `prepare` starts more itself, and a process that ran threads should not fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.path = path
        try:
            self._definition = json.loads(path.read_text(encoding="utf-8"))
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from error
        self._model.no_truncation()  # a file may carry a model's context length, and would cut documents to it
        self._model.no_padding()
        self._model.encode_special_tokens = True  # a document that spells a special token's name must not get the token
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        special = [token["content"] for token in self._definition["added_tokens"] if token["special"]]
        names = [name for name in END_OF_DOCUMENT_NAMES if name in special]
        if not names:
            raise DataError(
                f"{path}: no token ends a document: none of its special tokens {special} is one of "
                f"{list(END_OF_DOCUMENT_NAMES)}; add one of these to the tokenizer"
            )
        self.end_of_document: int = self._model.token_to_id(names[0])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> "NDArray[np.int32]":
        import numpy as np

        sizes = np.zeros(self.vocab_size, np.int32)
        decoder = self._definition.get("decoder") or {}
        kinds = {step["type"] for step in [decoder, *decoder.get("decoders", [])] if step}
        for piece, token in self._model.get_vocab(with_added_tokens=False).items():
            if "ByteLevel" in kinds:
                sizes[token] = len(piece)  # such vocabularies spell each byte as one printable character
            elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace(SPACE_MARK, " ").encode())
        for added in self._definition["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes


def train_tokenizer(documents: Iterable[str], spec: str, out_path: Path) -> None:
    """Train a SentencePiece tokenizer and write its model file.

    The same documents and the same `spec` give the same file, byte for byte. Ids 0, 1 and 2 are `<unk>`, `<s>` and
    `</s>`, then come the 256 bytes. Digits are kept apart, and runs of spaces may become tokens, which code needs.

    Args:
        documents: the texts to learn from; all of them are held in memory.
        spec: `bpe:VOCAB` or `unigram:VOCAB`, VOCAB being the number of tokens.
        out_path: the file to write.

    Raises:
        DataError: the text cannot give a vocabulary of that size; says which sizes would do.
    """
    import sentencepiece

    matched = TRAINED_SPEC.fullmatch(spec)
    assert matched, f"{spec!r} does not name a tokenizer to train"
    kind, vocab_size = matched[1], int(matched[2])
    lines = (
        line[start : start + MAX_TRAINING_LINE_CHARS]
        for document in documents
        for line in re.split("[\n\r\t]", document)  # bytes to the tokenizer, so no token reaches across one
        for start in range(0, len(line), MAX_TRAINING_LINE_CHARS)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * MAX_TRAINING_LINE_CHARS,  # in bytes
            num_threads=NUM_TRAINING_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "!sentences_.empty()" in str(error):
            raise DataError(f"{spec}: there is no text to train the tokenizer on") from error
        if largest := re.search(r"set it to a value <= (\d+)", str(error)):
            raise DataError(
                f"{spec}: the text gives at most {largest[1]} tokens; choose {kind}:{largest[1]} or less"
            ) from error
        if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"{spec}: bytes and single characters alone need {smallest[1]} tokens; choose a larger vocabulary"
            ) from error
        raise DataError(f"{spec}: cannot be trained on this text ({error})") from error
    out_path.write_bytes(model.getvalue())
