"""Conversations as the tokens that a model was trained on, by the chat template in its tokenizer's folder.

A template is a program in Jinja that its author wrote: it runs in Jinja's sandbox, with the functions that Transformers
gives to it, and reaches neither files nor attributes of Python.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import DataError
from data.tokenizer import Tokenizer
from data.transformers_files import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    chat_template,
    json_object,
)

Message = dict[str, str]
"""With `role` (system, user or assistant) and `content`."""


class _Generation(Extension):
    """`{% generation %}`, which marks what a model is trained on, and writes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: whose folder has it.

    Raises:
        DataError: it has none, or none that can be read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.folder = tokenizer, tokenizer.path.parent
        text = chat_template(self.folder)
        if text is None:
            raise DataError(
                f"{self.folder}: there is no chat template beside the tokenizer, neither {CHAT_TEMPLATE} nor "
                f"chat_template in {TOKENIZER_CONFIG}. `tritrain generate` continues a text with any model; "
                "--tokenizer FOLDER names a tokenizer with a template"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise DataError(f"{self.folder}: the chat template is no Jinja template: {error}") from error
        self._tokens = {
            key: value.get("content") if isinstance(value, dict) else value
            for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG)
            for key, value in json_object(self.folder / name).items()
            if key.endswith("_token")
        }

    def text(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """A conversation as text.

        Args:
            messages: in order.
            to_answer: whether the beginning of the next answer follows.

        Raises:
            DataError: the template refuses the conversation.
        """
        values = {"messages": [*messages], "add_generation_prompt": to_answer, "tools": None, "documents": None}
        try:
            return self._template.render(**self._tokens | values)
        except Exception as error:  # a program's errors are of any kind
            raise DataError(f"{self.folder}: the chat template refuses this conversation: {error}") from error

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the next answer follows.

        Raises:
            DataError: the template refuses the conversation, or a message is not text.
        """
        text = self.text(messages, to_answer=True)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the message is not text: {error}; write it in UTF-8") from error
        return self.tokenizer.encode_special(text)

    def end_tokens(self) -> set[int]:
        """The tokens that end an answer.

        They are the special token that the template writes after one, those of `generation_config.json`, and the one
        that ends documents.
        """
        named = json_object(self.folder / GENERATION_CONFIG).get("eos_token_id")
        ends = {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
        answer = "An answer."
        written = self.text([{"role": "user", "content": "A question."}, _assistant(answer)], to_answer=False)
        after = written.rpartition(answer)[2].lstrip()
        first = self.tokenizer.encode_special(after)[:1]
        if (
            first
            and after.startswith(name := self.tokenizer.name_of(first[0]))
            and self.tokenizer.encode(name) != first
        ):
            ends |= {*first}
        return ends | {self.tokenizer.end_of_document}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
