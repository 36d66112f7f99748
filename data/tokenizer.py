"""Turn text into token ids and back, and count the bytes of text that each token stands for.

Two kinds of file are read: SentencePiece models (`*.model`) and Hugging Face tokenizers (`*.json`). New ones are
trained with SentencePiece so that they lose nothing: identity normalization, no dummy prefix, no whitespace removed,
and bytes for what the vocabulary lacks (newline and tab among them), hence `decode(encode(text)) == text` for any text.
The counts of `token_bytes` turn a loss in nats per token into bits per byte, which compares across vocabularies.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.config import TRAINED_SPEC
from data.errors import DataError
from data.fast_encoding import FastEncoder
from data.hub_tokenizer import fetch_tokenizer, is_on_hub
from data.messages import looked_for_in
from data.pointers import pointer_problem
from data.spans import Span
from data.tokenizer_definition import read_definition, vocabulary
from data.tokenizer_kinds import SPACE_MARK, HuggingFaceTokenizer, SentencePieceTokenizer, sentencepiece_model
from data.transformers_files import added_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_TRAINING_THREADS = 4  # part of the result for unigram, whose sums depend on how the text was divided
MAX_TRAINING_LINE_CHARS = 4000
UNKNOWN_ID = 0


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    path: Path
    vocab_size: int
    end_of_document: int
    """Id of the token that follows each document."""
    fast: FastEncoder | None
    """What encodes texts instead of the tokenizer's own library, with the same ids; see `data.fast_encoding`."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding any special token; the name of one in the text is just text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode` gives for each text."""
        ...

    def parts(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut a text, given in blocks of any size, into the parts that are encoded by themselves, at least one.

        They have about a million characters, whatever the length of the text, if the tokenizer's tokens do not depend
        on the whole of it.
        """
        ...

    def encode_parts(self, parts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """Return the ids of each part; those of all parts of a text, one after the other, are what `encode` gives.

        Args:
            parts: of texts.
            begins: whether each is the first of its text.
        """
        ...

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Return the ids that the tokenizer's own library gives, without what is put in front of a document."""
        ...

    def definition_of_pieces(self) -> dict[str, Any] | None:
        """Return a `tokenizer.json` that encodes as `encode_pieces`; None if there is none.

        Raises:
            DataError: there is none; says why.
        """
        ...

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of a text in which the name of a special token is this token, as in chat templates."""
        ...

    @property
    def control_tokens(self) -> list[int]:
        """Return the ids of the special tokens that stand for no text, as the tokenizer's file marks them."""
        ...

    @property
    def prefixes_parts(self) -> bool:
        """Whether the space that the tokenizer puts in front of a text comes after special tokens too."""
        ...

    def encode_special_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Return what `encode_special` gives, and of each id the first character of its text and the one after it.

        Ids that share a character, of its bytes, have one text.

        Raises:
            DataError: the tokenizer changes the text.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids; those beyond the vocabulary, of a padded model, have none."""
        ...

    def name_of(self, token: int) -> str:
        """Return a token as the vocabulary spells it."""
        ...

    def token_bytes(self) -> "NDArray[np.int32]":
        """Return the number of UTF-8 bytes that each token stands for, shape [vocab_size]; 0 for special tokens.

        If the tokenizer loses nothing, the sum over `encode(text)` and the end of the document is
        `len(text.encode())`. Where the tokens of each document stand for one space more than the document has, as with
        SentencePiece's dummy prefix, the end counts -1.
        """
        ...

    def file_content(self) -> bytes:
        """Return the tokenizer's file, with a mark on the token that ends documents if only other files name it."""
        ...

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokenizer's file, in hexadecimal digits."""
        ...


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Read a SentencePiece model, a `tokenizer.json`, a folder that holds one of them, or `hf:NAME` from the hub.

    Of a folder that holds both, the SentencePiece model is read if it has all tokens of the `tokenizer.json`.

    Args:
        path: file, folder, or name on the hub; see `data.hub_tokenizer`.
        end_of_document: the token that ends a document; by default the one that the files name, see
            `data.end_of_document`.

    Raises:
        DataError: there is no such file, it is of neither kind, or it is not known which token ends a document.
    """
    spec = str(path)
    path = fetch_tokenizer(spec) if is_on_hub(spec) else Path(path)
    if path.is_dir():
        found = file_in(path)
        if found is None:
            raise DataError(f"{spec}: has neither tokenizer.model nor tokenizer.json")
        path = found
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer file{looked_for_in(path)}; name a SentencePiece .model, a tokenizer.json, "
            "hf:NAME or bpe:VOCAB"
        )
    if problem := pointer_problem(path):
        raise DataError(f"{path}: {problem}")
    added = added_tokens(path.parent)
    if path.suffix == ".model":
        tokenizer: Tokenizer = SentencePieceTokenizer(path, end_of_document)
        lacking = [name for name, token in added.items() if token >= tokenizer.vocab_size]
        advice = "as tokenizer.json, which has them"
    elif path.suffix == ".json":
        tokenizer = fast = HuggingFaceTokenizer(path, end_of_document)
        there = vocabulary(fast.definition) if added else {}
        lacking = [name for name in added if name not in there]
        advice = "anew, with them"
    else:
        raise DataError(f"{path}: must be a SentencePiece .model or a Hugging Face .json file, not {path.suffix!r}")
    if lacking:
        raise DataError(
            f"{path}: lacks tokens that files beside it add, such as {lacking[0]!r}; save the tokenizer {advice} "
            "(`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`)"
        )
    return tokenizer


def file_in(folder: Path) -> Path | None:
    """The file in a folder that `load_tokenizer` reads, which may still be none that it can read; None without one."""
    found = [path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).is_file()]
    if len(found) < 2:
        return next(iter(found), None)
    model, definition = found
    try:
        pieces = sentencepiece_model(model, model.read_bytes())
        tokens = vocabulary(read_definition(definition))
    except DataError:  # the model is another program's, such as tiktoken's; or the definition is damaged
        return definition
    if max(tokens.values(), default=-1) >= pieces.vocab_size():
        return definition
    has_all = all(pieces.id_to_piece(token) in (name, name.replace(" ", SPACE_MARK)) for name, token in tokens.items())
    return model if has_all else definition


def train_tokenizer(documents: Iterable[str], spec: str, out_path: Path) -> None:
    """Train a SentencePiece tokenizer and write its model file.

    The same documents and the same `spec` give the same file, byte for byte. Ids 0, 1 and 2 are `<unk>`, `<s>` and
    `</s>`, then come the 256 bytes. Digits are kept apart, and runs of spaces may become tokens, which code needs. A
    character that the text hardly uses is written in bytes, but a space must be a token: SentencePiece spells it
    U+2581, and the bytes of that would be U+2581 again.

    Args:
        documents: the texts to learn from; all of them are held in memory.
        spec: `bpe:VOCAB` or `unigram:VOCAB`, VOCAB being the number of tokens.
        out_path: the file to write.

    Raises:
        DataError: the text cannot give a vocabulary of that size; says which sizes would do.
    """
    matched = TRAINED_SPEC.fullmatch(spec)
    assert matched, f"{spec!r} does not name a tokenizer to train"
    kind, vocab_size = matched[1], int(matched[2])
    lines = [
        line[start : start + MAX_TRAINING_LINE_CHARS]
        for document in documents
        for line in re.split("[\n\r\t]", document)  # bytes to the tokenizer, so no token reaches across one
        for start in range(0, len(line), MAX_TRAINING_LINE_CHARS)
    ]
    content = _trained(lines, kind, vocab_size, spec)
    if sentencepiece_model(out_path, content).piece_to_id(SPACE_MARK) == UNKNOWN_ID:
        content = _trained(lines, kind, vocab_size, spec, required_chars=SPACE_MARK)
    out_path.write_bytes(content)


def _trained(lines: list[str], kind: str, vocab_size: int, spec: str, **settings: Any) -> bytes:
    """The file of a model that was trained on lines of text, with more settings of SentencePiece's."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
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
            unk_id=UNKNOWN_ID,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            **settings,
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
    return model.getvalue()
