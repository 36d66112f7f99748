"""Chats as records: objects with `messages`, a list of objects with `role` and `content`.

Other keys of a message are for the template. Nothing is guessed: each problem names the file and the line.
"""

import json
from typing import Any

from data.errors import DataError

MESSAGES_KEY, TOOLS_KEY = "messages", "tools"
ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_of(record: Any, origin: str) -> str:
    """The messages of a record, checked, as JSON.

    Raises:
        DataError: there is no conversation with an answer in it.
    """
    if not isinstance(record, dict) or MESSAGES_KEY not in record:
        found = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is {type(record).__name__}"
        raise DataError(f'{origin}: a chat is an object with the key "{MESSAGES_KEY}"; {found:.300}')
    if record.get(TOOLS_KEY):
        raise DataError(f"{origin}: has tools, of which templates are not told; remove the chat")
    messages = record[MESSAGES_KEY]
    if not isinstance(messages, list):
        raise DataError(f'{origin}: "{MESSAGES_KEY}" is {type(messages).__name__}; must be a list of messages')
    for number, message in enumerate(messages, start=1):
        if problem := message_problem(message):
            raise DataError(f"{origin}: message {number} {problem}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{origin}: no message is the assistant's, so there is nothing to learn from the chat")
    return json.dumps(messages, ensure_ascii=False)


def message_problem(message: Any) -> str | None:
    """Say why an object is no message of a chat; None if it is one."""
    if not isinstance(message, dict):
        return f"is {type(message).__name__}; must be an object with role and content"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {role!r:.80}; choose one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"({role}) has {type(content).__name__} as content; must be text"
    if not content.strip():
        return f"({role}) has empty content; write it, or remove the chat"
    return None
