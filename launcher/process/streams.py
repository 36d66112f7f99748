"""Standard streams that a process may lose, or whose encoding lacks a character.

The terminal is closed, or the reader of a pipe has ended: training must save then, and record why it stopped; no write
to a stream, whoever prints, may keep it from that. Nor may a name or a plus-minus sign.
"""

import io
import sys
from typing import Any, TextIO


class LosableStream(io.FileIO):
    """A stream that raises no errors: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        """Write a buffer of bytes; returns the number of bytes that are done with."""
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None: another program has made a full pipe non-blocking


def outlive_streams() -> None:
    """From now on no write to this process's stdout or stderr raises OSError."""
    sys.stdout, sys.stderr = losable(sys.stdout), losable(sys.stderr)


def lack_characters() -> None:
    """From now on a character that stdout's encoding lacks is written as a question mark, and is no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def losable(stream: TextIO) -> TextIO:
    """A stream to the same file that raises no errors, and writes each line at once."""
    stream.flush()
    file = io.BufferedWriter(LosableStream(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, encoding=stream.encoding, errors="replace", line_buffering=True)
