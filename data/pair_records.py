"""Pairs of answers as records, in the formats of TRL: `chosen` and `rejected`, and mostly `prompt`.

All are lists of messages, or all are text. Without a prompt, it is the beginning that both answers share, as TRL's
`extract_prompt` finds it. Nothing else is guessed: each problem names the file and the line.
"""

import json
from itertools import takewhile
from typing import Any

from data.chat_records import TOOLS_KEY, message_problem, tools_of
from data.errors import DataError

PROMPT_KEY = "prompt"
SIDES = ("chosen", "rejected")


def pair_of(record: Any, origin: str) -> str:
    """The prompt and both answers of a record, checked, as JSON, with its tools if it has any.

    Raises:
        DataError: these are not two different answers to one prompt.
    """
    if not isinstance(record, dict) or not all(record.get(side) is not None for side in SIDES):
        found = f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is {type(record).__name__}"
        raise DataError(f'{origin}: a pair is an object with the keys "chosen" and "rejected"; {found:.300}')
    given = {key: record[key] for key in (PROMPT_KEY, *SIDES) if record.get(key) is not None}
    kinds = {type(value) for value in given.values()}
    if kinds not in ({str}, {list}):
        found = ", ".join(f"{key} is {type(value).__name__}" for key, value in given.items())
        raise DataError(f"{origin}: a pair is all text, or all lists of messages; {found}")
    if kinds == {list}:
        for key, messages in given.items():
            for number, message in enumerate(messages, start=1):
                if problem := message_problem(message):
                    raise DataError(f"{origin}: {key}, message {number} {problem}")
    if given["chosen"] == given["rejected"]:
        raise DataError(f"{origin}: chosen and rejected are equal, so there is nothing to prefer; remove the pair")
    if PROMPT_KEY not in given:
        given = _split(given)
    if problem := _answer_problem(given):
        raise DataError(f"{origin}: {problem}")
    if tools := tools_of(record, origin):
        if kinds == {str}:
            raise DataError(
                f"{origin}: has tools, but its answers are text, which no template writes; remove the tools"
            )
        given[TOOLS_KEY] = tools
    return json.dumps(given, ensure_ascii=False)


def _split(given: dict[str, Any]) -> dict[str, Any]:
    """Take what both answers begin with as the prompt; a space before the difference belongs to the answers."""
    chosen, rejected = (given[side] for side in SIDES)
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return {PROMPT_KEY: chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _answer_problem(given: dict[str, Any]) -> str | None:
    prompt = given[PROMPT_KEY]
    for side in SIDES:
        answer = given[side]
        if not answer:
            return f"{side} has no answer to the prompt"
        if isinstance(answer, str):
            continue
        if answer[0]["role"] != "assistant":
            return f"{side} has no answer to the prompt: its message after it is of {answer[0]['role']}"
    if isinstance(prompt, list) and not prompt:
        return "has no prompt, neither as prompt nor as messages that chosen and rejected begin with"
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        return "the prompt ends with an answer; put that message into chosen and rejected"
    return None
