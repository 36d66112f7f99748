"""Chats as records: objects with `messages`, a list of objects with `role` and `content`, and perhaps `tools`.

Tools are a list of JSON schemas, or that list as text in JSON, since a column of a table cannot hold schemas that
differ. A message of the assistant may call them, with `tool_calls` instead of content, and a message with the role tool
is what came back. Other keys of a message are for the template. Nothing is guessed: each problem names the file and
the line.
"""

import json
from collections.abc import Mapping
from typing import Any

from data.errors import DataError

MESSAGES_KEY, TOOLS_KEY = "messages", "tools"
WEIGHT_KEY = "weight"
"""Of a message: other programs leave out an answer whose weight is 0."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def chat_of(record: Any, origin: str) -> str:
    """The messages of a record, checked, as JSON; with tools, an object that has both.

    Raises:
        DataError: there is no conversation with an answer in it.
    """
    if not isinstance(record, dict) or MESSAGES_KEY not in record:
        found = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is {type(record).__name__}"
        raise DataError(f'{origin}: a chat is an object with the key "{MESSAGES_KEY}"; {found:.300}')
    messages = record[MESSAGES_KEY]
    if not isinstance(messages, list):
        raise DataError(f'{origin}: "{MESSAGES_KEY}" is {type(messages).__name__}; must be a list of messages')
    for number, message in enumerate(messages, start=1):
        if problem := message_problem(message):
            raise DataError(f"{origin}: message {number} {problem}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{origin}: no message is the assistant's, so there is nothing to learn from the chat")
    tools = tools_of(record, origin)
    return json.dumps({MESSAGES_KEY: messages, TOOLS_KEY: tools} if tools else messages, ensure_ascii=False)


def tools_of(record: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    """The tools of a record; empty if it has none.

    Raises:
        DataError: they are no list of schemas.
    """
    tools = record.get(TOOLS_KEY)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{origin}: "{TOOLS_KEY}" is text that is not JSON: {error}') from error
    if not tools:
        return []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f'{origin}: "{TOOLS_KEY}" must be a list of JSON schemas, each an object')
    return tools


def message_problem(message: Any) -> str | None:
    """Say why an object is no message of a chat; None if it is one."""
    if not isinstance(message, dict):
        return f"is {type(message).__name__}; must be an object with role and content"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {role!r:.80}; choose one of {', '.join(ROLES)}"
    if message.get(WEIGHT_KEY) not in (None, 1):
        return (
            f"({role}) has the weight {message[WEIGHT_KEY]!r:.80}; all answers count, so remove the weight or the chat"
        )
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            return f"({role}) has tool_calls; only the assistant calls tools"
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            return f"({role}) has tool_calls that are no list of objects"
        if content is None:
            return None
    if not isinstance(content, str):
        return f"({role}) has {type(content).__name__} as content; must be text"
    if not (content.strip() or calls or role == "tool"):
        return f"({role}) has empty content; write it, or remove the chat"
    return None


def without_nulls(value: Any) -> Any:
    """A cell of a table without the keys that have no value inside of it: a table fills in those of other rows."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
