"""Chats as training data: tokenized by a chat template, with the answers as what counts.

Each chat that cannot be learned from is an error that names the file and the line.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat_records import MESSAGES_KEY, TOOLS_KEY
from data.chat_template import ChatTemplate, Message, Tools
from data.config import PrepareConfig, TooLong
from data.documents import Document
from data.encoding import PIECE_COUNTS, Chunk, Piece, about_pieces
from data.errors import DataError
from data.marks import COUNTS, ids_of, with_marks
from data.readers import Place
from data.spans import inside
from data.tokenizer import Tokenizer, load_tokenizer

SPECIAL_NAME = re.compile(r"<\|[^\s|<>]+\|>|<\uff5c[^\s\uff5c<>]+\uff5c>|<\w+_of_\w+>|</?s>|<[be]os>")
"""What templates write where they mean a special token, and nobody writes otherwise."""


CHAT_COUNTS = (*PIECE_COUNTS, "counted_tokens", "dropped_chats", "truncated_chats")
"""Of a chat, also the tokens that are to be predicted, and whether it is left out, or its end is, as it is too long."""


class ChatEncoder:
    """Tokenizes chats.

    Args:
        template: the chat template with its tokenizer.
        most_tokens: of a chat.
        too_long: what to do with one that has more: raise an error, leave it out, or leave out its end.
    """

    counts = CHAT_COUNTS
    dtype = np.uint32
    noun = "chat"

    def __init__(self, template: ChatTemplate, most_tokens: int, too_long: TooLong) -> None:
        self.template, self._most, self._too_long = template, most_tokens, too_long
        self._known_names: set[str] = set()

    def __reduce__(self) -> Any:  # a worker reads the files again
        return _open_encoder, (type(self), self.template.tokenizer.path, self._most, self._too_long)

    def cut(self, assigned: Iterable[tuple[str, Place, Document]]) -> Iterator[tuple[str, Piece]]:
        """Return chats as they are, each a piece."""
        for split, place, document in assigned:
            yield split, Piece(document.text, document.origin, (*place, 0), ends=True)

    def encode(self, pieces: Sequence[Piece]) -> Chunk:
        """Tokenize chats as `chat_of` gives them.

        Raises:
            DataError: a chat cannot be learned from; says which and why.
        """
        chats: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
        facts = about_pieces(pieces, self.counts)
        sizes = self.template.tokenizer.token_bytes()
        for piece, about in zip(pieces, facts, strict=True):
            try:
                tokens = self.marked(json.loads(piece.text))
                is_too_long = len(tokens) > self._most
                if is_too_long and self._too_long == "error":
                    raise DataError(
                        f"the {self.noun} has {len(tokens)} tokens, and a row {self._most}; prepare with a larger "
                        f"sequence_length, or choose --too-long drop{' or truncate' * (self.noun == 'chat')}"
                    )
            except DataError as error:
                raise DataError(f"{piece.origin}: {error}") from error
            tokens = tokens[: self._most]
            num_counted = int(np.count_nonzero(tokens & np.uint32(COUNTS)))
            if is_too_long and (self._too_long == "drop" or not num_counted):
                about["dropped_chats"] = 1
                continue
            about["documents"], about["truncated_chats"] = 1, is_too_long
            about["tokens"], about["counted_tokens"] = len(tokens), num_counted
            about["text_bytes"] = about["token_bytes"] = sizes[ids_of(tokens)].sum()
            chats.append(tokens)
        return Chunk(np.concatenate(chats), facts)

    def marked(self, record: Any) -> NDArray[np.uint32]:
        """The tokens of a record, with marks; raises what `encode_chat` does."""
        if isinstance(record, dict):
            return with_marks(*self.encode_chat(record[MESSAGES_KEY], record[TOOLS_KEY]))
        return with_marks(*self.encode_chat(record))

    def encode_chat(
        self, messages: Sequence[Message], tools: Tools = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a chat, and whether each is part of an answer.

        Raises:
            DataError: the template refuses the chat, does not tell its answers apart, or needs a special token that the
                vocabulary does not have.
        """
        text, answers = self.template.answers(messages, tools)
        self.check_names(text, messages)
        ids, spans = self.template.tokenizer.encode_special_spans(text)
        counts = inside(spans, answers)
        counts[:1] = False  # nothing comes before it
        if not counts.any():
            raise DataError("the chat template writes no answer of this chat")
        return np.array(ids), counts

    def check_names(self, text: str, messages: Sequence[Message]) -> None:
        """Make sure that the special tokens that the template writes are tokens."""
        tokenizer = self.template.tokenizer
        missing = []
        for name in dict.fromkeys(SPECIAL_NAME.findall(text)):
            if name in self._known_names or len(tokenizer.encode_special(name)) == 1:
                self._known_names.add(name)
            elif not any(name in _text_of(message) for message in messages):
                missing.append(name)
        if missing:
            raise DataError(
                f"the chat template writes {' and '.join(missing)}, which the tokenizer does not have as one token; "
                f"add {' '.join(f'--add-token {shlex.quote(name)}' for name in missing)}, or choose another tokenizer "
                "or --chat-template"
            )


def _text_of(message: Message) -> str:
    """What a message says, with the arguments of its calls."""
    return f"{message.get('content')} {json.dumps(message.get('tool_calls'), ensure_ascii=False)}"


def _open_encoder(kind: type[ChatEncoder], tokenizer: Path, most_tokens: int, too_long: TooLong) -> ChatEncoder:
    return kind(ChatTemplate(load_tokenizer(tokenizer)), most_tokens, too_long)


def template_for(config: PrepareConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that chats are prepared with.

    Raises:
        DataError: there is none, or none that can be read.
    """
    return ChatTemplate(tokenizer, None if config.chat_template is None else Path(config.chat_template))
