"""Reads what Weights & Biases writes offline: records of its own protocol, in LevelDB's log format.

A file begins with a header of 7 bytes. Blocks of 32 KiB follow, with chunks of records: CRC (4 bytes), length (2), type
(1: whole, 2: first, 3: middle, 4: last), content. The client has no reader in Python.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, WHOLE, LAST = 2**15, 7, 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield each record of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block in which no chunk fits
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of the history, by key."""
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in row} for row in rows]
