"""The two kinds of tokenizer, SentencePiece models and files of the `tokenizers` library; see `data.tokenizer`.

Ids are those of SentencePiece and of `tokenizers`, except where these would lose text:

- A text's own U+2581, which many vocabularies take for a space, is written in bytes if the vocabulary has them.
- A tokenizer that puts a space in front of a text does so once for a document, whatever the document begins with.
  `tokenizers` leaves it out before a space, and may repeat it after added tokens.
- The name of a special token in a text is just text.

Texts of more than `SEGMENT_CHARS` are encoded in parts.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.end_of_document import USUAL_NAMES, find_end_of_document
from data.errors import DataError
from data.fast_encoding import FastEncoder
from data.sentencepiece_model import does_prefix_parts, ending_documents, without_dummy_prefix
from data.spans import Span, spans_of_bytes
from data.tokenizer_definition import (
    ENDS_DOCUMENTS,
    bytes_of_tokens,
    decoder_kinds,
    read_definition,
    special_token_,
    vocabulary,
    without_prefix,
)
from data.transformers_files import prefixes_every_part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so a literal one needs care
MARK_BYTES = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
SPACE_FOR_EACH_WORD = {"WordPiece", "BPEDecoder"}
NEEDS_ALL_CHARACTERS = (
    "; its vocabulary must have every word or character of the text, or the token that its unk_token names"
)
SEGMENT_CHARS = 1 << 20  # longer texts are encoded in parts, or one large file would need many times its size


def segments(blocks: Iterable[str], prefix_chars: int = 0) -> Iterator[str]:
    """Cut a very long text near every `SEGMENT_CHARS` characters, after a newline, where few tokens join.

    Args:
        blocks: the text, in parts of any size.
        prefix_chars: what is put in front of the text, and is part of the first segment's length.
    """
    rest, most = "", SEGMENT_CHARS - prefix_chars
    for block in blocks:
        rest += block
        begin = 0
        while len(rest) - begin > most:
            newline = rest.rfind("\n", begin, begin + most)
            end = newline + 1 if newline >= begin else begin + most
            yield rest[begin:end]
            begin, most = end, SEGMENT_CHARS
        rest = rest[begin:]
    yield rest


class _InParts:
    """Encodes texts in parts, with the space in front of the first part that the tokenizer puts there."""

    path: Path
    _prefix: str | None
    """What the tokenizer puts in front of a text, a space or nothing; None if it changes spaces in other ways too, so
    that texts are not cut."""
    fast: FastEncoder | None = None
    """What encodes pieces instead, with the same ids."""
    _mark_ids: list[int] | None
    """The bytes of `SPACE_MARK`, where the tokenizer would take it for a space."""

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def definition_of_pieces(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _count_bytes(self) -> "NDArray[np.int32]":
        raise NotImplementedError

    @cached_property
    def _token_bytes(self) -> "NDArray[np.int32]":
        return self._count_bytes()

    def token_bytes(self) -> "NDArray[np.int32]":
        return self._token_bytes

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(self.parts([text])) for text in texts]
        begins = [place == 0 for each in parts for place in range(len(each))]
        encoded = iter(self.encode_parts([part for each in parts for part in each], begins))
        return [[token for _ in each for token in next(encoded)] for each in parts]

    def parts(self, blocks: Iterable[str]) -> Iterator[str]:
        if self._prefix is None:
            yield "".join(blocks)
        else:
            yield from segments(blocks, len(self._prefix))

    def encode_parts(self, parts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        cut = [list(self._cut(part, first)) for part, first in zip(parts, begins, strict=True)]
        encode = self.encode_pieces if self.fast is None else self.fast.encode_compared
        encoded = iter(encode([piece for pieces in cut for piece in pieces if piece is not None]))
        result: list[list[int]] = []
        for pieces in cut:
            ids: list[int] = []
            for piece in pieces:
                ids += (self._mark_ids or []) if piece is None else next(encoded)
            result.append(ids)
        return result

    def _cut(self, part: str, is_first: bool) -> Iterator[str | None]:
        """The pieces of a part, None for each literal `SPACE_MARK` that is to be written in bytes."""
        if not part or self._prefix is None:
            yield part
            return
        text = self._prefix + part if is_first else part
        first, *others = text.split(SPACE_MARK) if self._mark_ids else [text]
        yield first
        for other in others:
            yield None
            yield other


def _prefix_of(whole: Callable[[str], list[int]], bare: Callable[[str], list[int]]) -> str | None:
    """What a tokenizer puts in front of a text, found by one that does not; see `_InParts`."""
    return next((prefix for prefix in ("", " ") if bare(f"{prefix}a") == whole("a")), None)


def sentencepiece_model(path: Path, content: bytes) -> Any:
    """SentencePiece's processor of a file's content.

    Raises:
        DataError: it is no model of SentencePiece.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(
            f"{path}: not a SentencePiece model ({error}); if it is tiktoken's, as Llama 3's is, name the "
            "tokenizer.json of the same model"
        ) from error


class SentencePieceTokenizer(_InParts):
    """A SentencePiece model; see `data.tokenizer.Tokenizer`."""

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        self.path, self._content = path, path.read_bytes()
        self._model = sentencepiece_model(path, self._content)
        self.vocab_size: int = self._model.vocab_size()
        own: int = self._model.eos_id()
        self.end_of_document = find_end_of_document(
            path,
            end_of_document,
            [] if own < 0 else [self.name_of(own)],
            is_marked=False,
            special=[self.name_of(token) for token in range(self.vocab_size) if self._model.is_control(token)],
            id_of=self._id_of,
        )
        if self.end_of_document != own:
            self._content = ending_documents(self._content, self.end_of_document)
            self._model = sentencepiece_model(path, self._content)
        self._bare, self._prefix = self._model, ""
        if self._model.normalize("a") != "a":
            self._bare = sentencepiece_model(path, without_dummy_prefix(self._content))
            self._prefix = _prefix_of(self._model.encode, self._bare.encode)
        mark = [self._model.piece_to_id(name) for name in MARK_BYTES]
        self._mark_ids = mark if all(self._model.is_byte(token) for token in mark) else None

    def _id_of(self, name: str | int) -> int | None:
        if isinstance(name, int):
            return name if 0 <= name < self.vocab_size else None
        token: int = self._model.piece_to_id(name)
        return token if self.name_of(token) == name else None

    def definition_of_pieces(self) -> dict[str, Any] | None:
        """A `tokenizer.json` that encodes as `encode_pieces`; see `data.fast_encoding`."""
        from data.tokenizer_json import definition_of_sentencepiece

        return None if self._prefix is None else without_prefix(definition_of_sentencepiece(self.path))

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Return the ids of texts, without what is put in front of a document."""
        model = self._model if self._prefix is None else self._bare
        return model.encode(pieces, num_threads=1)

    @cached_property
    def _special(self) -> dict[str, int]:
        model = self._model
        return {self.name_of(token): token for token in range(self.vocab_size) if model.is_control(token)}

    @cached_property
    def prefixes_parts(self) -> bool:
        """Whether the dummy prefix, if there is one, comes after special tokens too."""
        return self._prefix != "" and (prefixes_every_part(self.path.parent) or does_prefix_parts(self._content))

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens; see `data.tokenizer.Tokenizer`."""
        return [token for part in self._special_parts(text) for token in part[1]]

    @property
    def control_tokens(self) -> list[int]:
        """Return the ids of control pieces."""
        return list(self._special.values())

    def _special_parts(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """The names of special tokens in a text and what is between them, each with its ids.

        As in Transformers, whose `legacy` tokenizers put the dummy prefix in front of each part.
        """
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        parts = re.split(f"({'|'.join(names)})", text) if names else [text]
        is_first = True
        for place, part in enumerate(parts):
            if place % 2:
                yield part, [self._special[part]]
            elif part:
                begins = is_first or self.prefixes_parts
                yield part, self.encode(part) if begins else self.encode_parts([part], [False])[0]
            is_first = is_first and not part

    def encode_special_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a text with special tokens and their places; see `data.tokenizer.Tokenizer`.

        SentencePiece's own places are in a normalized text. Where nothing is lost, the bytes of the pieces add up.
        """
        ids: list[int] = []
        sizes: list[int] = []
        for part, tokens in self._special_parts(text):
            num_bytes = [len(part.encode())] if part in self._special else self.token_bytes()[tokens].tolist()
            if self._prefix and (not ids or self.prefixes_parts) and part not in self._special:
                num_bytes[0] -= len(self._prefix)
            if sum(num_bytes) != len(part.encode()):
                raise DataError(f"{self.path}: changes the text {part!r:.80}, so its tokens have no places in it")
            ids += tokens
            sizes += num_bytes
        return ids, spans_of_bytes(text, sizes)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        return self._model.decode([token for token in ids if token < self.vocab_size])

    def name_of(self, token: int) -> str:
        """Return a token as the vocabulary spells it."""
        return self._model.id_to_piece(token)

    def _count_bytes(self) -> "NDArray[np.int32]":
        import numpy as np

        sizes = np.zeros(self.vocab_size, np.int32)
        for token, piece in enumerate(self._model.id_to_piece(list(range(self.vocab_size)))):
            if self._model.is_byte(token):
                sizes[token] = 1
            elif not (self._model.is_control(token) or self._model.is_unknown(token)):
                sizes[token] = len(piece.replace(SPACE_MARK, " ").encode())
        sizes[self.end_of_document] = 0 if self._prefix == "" else -1
        return sizes

    def file_content(self) -> bytes:
        """Return the file, with a mark on the token that ends documents if only other files name it."""
        return self._content


class HuggingFaceTokenizer(_InParts):
    """A `tokenizer.json`, read by the `tokenizers` library; see `data.tokenizer.Tokenizer`."""

    prefixes_parts = False

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        # One process is one worker: `prepare` starts more itself, and a process that ran threads should not fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.path, self.definition = path, read_definition(path)
        ids, added = vocabulary(self.definition), self.definition["added_tokens"]
        self.vocab_size = max(ids.values(), default=-1) + 1
        marked = [token["content"] for token in added if token.get(ENDS_DOCUMENTS)]
        special = [token["content"] for token in added if token.get("special")]
        self._own_names = marked or [name for name in USUAL_NAMES if name in (special or ids)]

        def id_of(name: str | int) -> int | None:
            return (name if name in ids.values() else None) if isinstance(name, int) else ids.get(name)

        self.end_of_document = find_end_of_document(
            path,
            end_of_document,
            self._own_names,
            is_marked=bool(marked),
            special=special,
            id_of=id_of,
        )
        for token in added:
            token.pop(ENDS_DOCUMENTS, None)
        special_token_(self.definition, self.end_of_document)[ENDS_DOCUMENTS] = True
        bare = without_prefix(self.definition)
        self._model = self._load(self.definition)
        self._bare = self._model if bare == self.definition else self._load(bare)
        theirs = self._model.get_vocab()
        if moved := next((name for name, token in ids.items() if theirs.get(name, token) != token), None):
            raise DataError(
                f"{path}: says that {moved!r} is token {ids[moved]}, but to the `tokenizers` library it is "
                f"{theirs[moved]}: this library numbers added tokens after the others, without gaps, and keeps the id "
                "of a token that is there; repair the ids in the file"
            )
        try:
            self._prefix = _prefix_of(partial(self._ids, self._model), partial(self._ids, self._bare))
        except DataError:  # only whole texts are given to it
            self._prefix = None
        self._mark_ids: list[int] | None = None
        self._decodes_prefix = False
        self._decodes_prefix = self._prefix == " " and self.decode(self.encode(" ")) != " "
        mark = [ids[name] for name in MARK_BYTES if name in ids]
        if len(mark) == len(MARK_BYTES) and self.decode(self.encode(SPACE_MARK)) != SPACE_MARK:
            self._mark_ids = mark

    def _load(self, definition: dict[str, Any]) -> Any:
        import tokenizers

        with self._naming("not a tokenizer of the `tokenizers` library"):
            model = tokenizers.Tokenizer.from_str(json.dumps(definition))
        model.encode_special_tokens = True  # a document that spells a special token's name must not get the token
        return model

    def definition_of_pieces(self) -> dict[str, Any] | None:
        """A `tokenizer.json` that encodes as `encode_pieces`; see `data.fast_encoding`."""
        return None if self._prefix is None else without_prefix(self.definition)

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Return the ids of texts, without what is put in front of a document."""
        model = self._model if self._prefix is None else self._bare
        with self._naming("cannot encode a text", NEEDS_ALL_CHARACTERS):
            return [encoding.ids for encoding in model.encode_batch(pieces, add_special_tokens=False)]

    @cached_property
    def _with_special(self) -> Any:
        model = self._load(self.definition)
        model.encode_special_tokens = False
        return model

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens; see `data.tokenizer.Tokenizer`."""
        return self._ids(self._with_special, text)

    @property
    def control_tokens(self) -> list[int]:
        """Return the ids of special added tokens."""
        return [token["id"] for token in self.definition["added_tokens"] if token.get("special")]

    def encode_special_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a text with special tokens and their places; see `data.tokenizer.Tokenizer`."""
        with self._naming("cannot encode a text", NEEDS_ALL_CHARACTERS):
            encoding = self._with_special.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _ids(self, model: Any, text: str) -> list[int]:
        with self._naming("cannot encode a text", NEEDS_ALL_CHARACTERS):
            return model.encode(text, add_special_tokens=False).ids

    @contextlib.contextmanager
    def _naming(self, failed: str, advice: str = "") -> Iterator[None]:
        """Turn what the library raises into a DataError: bare exceptions, and panics, which are none of Python's."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self.path}: {failed} ({error}){advice}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        with self._naming("cannot decode tokens"):
            text: str = self._model.decode(list(ids), skip_special_tokens=False)
        return text.removeprefix(" ") if self._decodes_prefix else text

    def name_of(self, token: int) -> str:
        """Return a token as the vocabulary spells it."""
        return self._model.id_to_token(token)

    def _count_bytes(self) -> "NDArray[np.int32]":
        with self._naming("cannot decode tokens"):
            sizes = bytes_of_tokens(self._model, self.definition, self.vocab_size)
        # Some decoders write a space for each word, but not for a document's first or last.
        kinds = decoder_kinds(self.definition)
        sizes[self.end_of_document] = -(self._prefix != "") - (not kinds or not kinds.isdisjoint(SPACE_FOR_EACH_WORD))
        return sizes

    def file_content(self) -> bytes:
        """Return the file, with a mark on the token that ends documents if only other files name it."""
        if self._own_names == [self.name_of(self.end_of_document)]:
            return self.path.read_bytes()
        return json.dumps(self.definition, ensure_ascii=False).encode()
