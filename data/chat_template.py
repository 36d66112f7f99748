"""Conversations as the tokens that a model was trained on, by the chat template in its tokenizer's folder.

A template is a program in Jinja that its author wrote: it runs in Jinja's sandbox, with the functions that Transformers
gives to it, and reaches neither files nor attributes of Python. Texts are those of `apply_chat_template`, character by
character.

What a model learns of a conversation are its answers. A template may mark them with `{% generation %}`. Otherwise an
answer is what rendering the conversation up to its end adds to rendering it up to its beginning, with the generation
prompt: the tokens that generation would be asked for. That holds only if both are beginnings of the whole, which is
checked.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import DataError
from data.spans import Span
from data.tokenizer import Tokenizer, load_tokenizer
from data.transformers_files import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    chat_template,
    json_object,
    template_of_file,
)

Message = dict[str, Any]
"""With `role` and `content`, and what else a template may ask for, such as `tool_calls`."""

Tools = Sequence[dict[str, Any]] | None
"""JSON schemas of the tools that an assistant may call."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Generation(Extension):
    """`{% generation %}`, which marks what a model is trained on: what is written in it is noted with its place."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.extend(num_written=None, marked=[])

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text: str = caller()
        environment: Any = self.environment
        if environment.num_written is not None:
            environment.marked.append((environment.num_written, text))
        return text


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: whose folder has it, and says which special tokens have names.
        file: the template, instead of the folder's.

    Raises:
        DataError: there is none, or none that can be read.
    """

    def __init__(self, tokenizer: Tokenizer, file: Path | None = None) -> None:
        self.tokenizer, folder = tokenizer, tokenizer.path.parent
        text = chat_template(folder) if file is None else template_of_file(file)
        if text is None:
            raise DataError(
                f"{folder}: there is no chat template beside the tokenizer, neither {CHAT_TEMPLATE} nor "
                f"chat_template in {TOKENIZER_CONFIG}. --tokenizer FOLDER names a tokenizer with one; "
                "`tritrain prepare` takes one with --chat-template FILE, and `tritrain generate` needs none"
            )
        self._text, self.marks_answers = text, MARKS_ANSWERS.search(text) is not None
        self._environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self._template = self._environment.from_string(text)
        except TemplateError as error:
            raise DataError(f"{file or folder}: the chat template is no Jinja template: {error}") from error
        self._tokens = _special_tokens(tokenizer)

    def self_contained(self) -> str:
        """The template with the special tokens in it that its variables name, to be read without other files."""
        used = find_undeclared_variables(self._environment.parse(self._text)) & self._tokens.keys()
        sets = [f"{{% set {name} = {json.dumps(self._tokens[name], ensure_ascii=False)} %}}" for name in sorted(used)]
        return f"{''.join(sets)}\n{self._text}" if sets else self._text  # the newline after a block is not written

    def text(self, messages: Sequence[Message], tools: Tools = None, *, to_answer: bool) -> str:
        """A conversation as text.

        Args:
            messages: in order.
            tools: that the template is to describe.
            to_answer: whether the beginning of the next answer follows.

        Raises:
            DataError: the template refuses the conversation.
        """
        return "".join(self._blocks(messages, tools, to_answer=to_answer))

    def _blocks(self, messages: Sequence[Message], tools: Tools, *, to_answer: bool) -> Iterator[str]:
        values = {"messages": [*messages], "add_generation_prompt": to_answer, "tools": tools, "documents": None}
        try:
            yield from self._template.generate(**self._tokens | values)
        except Exception as error:  # a program's errors are of any kind
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def answers(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[Span]]:
        """A conversation as text, and the answers in it; see the top of this file.

        Raises:
            DataError: the template refuses the conversation, or does not tell its answers apart.
        """
        return self._marked(messages, tools) if self.marks_answers else self._added(messages, tools)

    def _marked(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        environment, written = self._environment, list[str]()
        environment.num_written, environment.marked = 0, []
        try:
            for block in self._blocks(messages, tools, to_answer=False):
                written.append(block)
                environment.num_written += len(block)
        finally:
            environment.num_written = None
        text = "".join(written)
        if not all(text.startswith(part, begin) for begin, part in environment.marked):
            raise DataError(
                "the chat template uses {% generation %} where its text is written later, as in a macro or a filter; "
                "use it outside of these"
            )
        return text, [(begin, begin + len(part)) for begin, part in environment.marked]

    def _added(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        whole, spans = self.text(messages, tools, to_answer=False), []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.text(messages[:place], tools, to_answer=True)
            after = whole if place + 1 == len(messages) else self.text(messages[: place + 1], tools, to_answer=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the chat template does not write message {place + 1} of this conversation as it does when the "
                    "conversation ends there, so that its answers cannot be told from the rest; mark them in the "
                    "template with {% generation %} and {% endgeneration %}"
                )
            spans.append((len(before), len(after)))
        return whole, spans

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
        named = json_object(self.tokenizer.path.parent / GENERATION_CONFIG).get("eos_token_id")
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


@contextlib.contextmanager
def self_contained(path: Path) -> Iterator[Path]:
    """A temporary copy of a tokenizer's file that says by itself which token ends documents, beside its chat template.

    Raises:
        DataError: the tokenizer or the template cannot be read.
    """
    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(tokenizer.file_content())
        if chat_template(path.parent) is not None:
            text = ChatTemplate(tokenizer).self_contained()
            copy.with_name(CHAT_TEMPLATE).write_text(text, encoding="utf-8", newline="")
        yield copy


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names that templates have for special tokens, as Transformers gives them.

    Where no file says anything, they are those of an exported model: a text begins and ends with the token that ends
    documents.
    """
    folder = tokenizer.path.parent
    if not any((folder / name).is_file() for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG)):
        return dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.name_of(tokenizer.end_of_document))
    named = {
        key: value.get("content") if isinstance(value, dict) else value
        for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG)
        for key, value in json_object(folder / name).items()
        if key.endswith("_token")
    }
    return {key: value for key, value in named.items() if isinstance(value, str) and value}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
