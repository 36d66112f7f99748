"""Text for people that quotes what others wrote: files, models, servers and the messages of libraries.

A terminal obeys escape sequences: they move its cursor, change its title and write into its clipboard. Marks that
reverse the direction of writing make a path or a number read as another one. Messages of libraries repeat passwords in
URLs, and some advise to turn off what keeps a stranger's code from running.
"""

import re
from pathlib import Path

from data.urls import redacted

UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: of C0, DEL and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of the direction of writing
    "\ud800-\udfff]"  # halves of surrogate pairs, which no terminal's encoding has
)

SENTENCE = re.compile(r"[^\n]+?(?:[.;!?](?=\s|$)|(?=\n)|$)[ \t]*")

RISKY_ADVICE = re.compile(
    r"weights_only\W{1,9}(argument|set to|to)\b|weights_only\W{0,9}=\W{0,9}False|no_weights_only|safe_globals"
    r"|allow_unsafe_types|trust_remote_code|allow_pickle\W{0,9}=\W{0,9}True|arbitrary code|trusted source"
    r"|verify\W{0,9}=\W{0,9}False",
    re.IGNORECASE,
)
"""In sentences that say how to make a library open what could run anything, or talk to anyone."""


def looked_for_in(path: str | Path) -> str:
    """For a sentence that says that there is no such file: where it was looked for, if the path does not say it."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def printable(text: str) -> str:
    """Text that a terminal only shows: control characters are written as Python escapes them."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def safe_message(text: object) -> str:
    """A message that may quote others, ready to be shown and kept: printable, without passwords and risky advice."""
    safe = SENTENCE.sub(lambda found: "" if RISKY_ADVICE.search(found[0]) else found[0], printable(str(text)))
    return redacted(safe).rstrip()
