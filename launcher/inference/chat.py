"""`tritrain chat`: a conversation with a model in the terminal."""

import io
import sys
from collections.abc import Iterator
from typing import Any

from data.chat_template import ChatTemplate, Message
from data.errors import DataError
from data.messages import printable
from eval.sample import pieces_of_text
from launcher.inference.text_model import TextModel

COMMANDS = "/exit or Ctrl-D ends, /reset begins anew, /drop forgets the oldest question and its answer"


def chat(model: TextModel, *, system: str | None, **choice: Any) -> None:
    """Answer lines of stdin, each in the light of the conversation so far; Ctrl-C ends an answer.

    Answers go to stdout, with control characters escaped; everything else goes to stderr.

    Args:
        model: with a tokenizer whose folder has a chat template.
        system: a message that comes first.
        choice: as for `eval.sample.generate`.

    Raises:
        CheckpointError: the model has no tokenizer.
        DataError: its tokenizer has no chat template, or the template refuses the system message.
    """
    template = ChatTemplate(model.required_tokenizer())
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    choice = {"end_tokens": template.end_tokens(), **choice}
    messages = [*begin]
    _say(COMMANDS)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = [*begin]
        elif line == "/drop":
            del messages[len(begin) : len(begin) + 2]
        elif line.startswith("/"):
            _say(f"{line}: no such command; {COMMANDS}")
        elif line:
            messages += _exchange(model, template, [*messages, {"role": "user", "content": line}], choice)


def _exchange(
    model: TextModel, template: ChatTemplate, messages: list[Message], choice: dict[str, Any]
) -> list[Message]:
    """Answer the last message; returns it with the answer, or nothing if there can be none."""
    context = model.config.max_sequence_length
    try:
        prompt = template.prompt_tokens(messages)
    except DataError as error:
        _say(str(error))
        return []
    if len(prompt) >= context:
        _say(
            f"The conversation would have {len(prompt)} tokens, and the model's context is {context}, including the "
            "answer. This message is left out of it; /drop makes room, /reset begins anew"
        )
        return []
    pieces, tokens = [], 0

    def counted() -> Iterator[int]:
        nonlocal tokens
        for token in model.generate_tokens(prompt, **choice):
            tokens += 1
            yield token

    try:
        for piece in pieces_of_text(template.tokenizer, counted(), prompt):
            pieces.append(piece)
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    if len(prompt) + tokens == context:
        _say(f"The context of {context} tokens is full; /drop makes room, /reset begins anew")
    return [messages[-1], {"role": "assistant", "content": "".join(pieces)}]


def _lines() -> Iterator[str]:
    """Lines of stdin, stripped, until it ends; a terminal can edit them."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - `input` uses it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text is a message's mistake, not the end
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            _say("")
            return
        if not is_terminal and not line:
            return
        yield line.strip()


def _say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
