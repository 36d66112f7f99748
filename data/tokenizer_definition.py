"""Read and change the definition in a `tokenizer.json`, as the `tokenizers` library writes it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

ENDS_DOCUMENTS = "ends_documents"
"""Key by which an added token says that it ends documents; `prepare` writes it, other programs pass over it."""
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
NEUTRAL = "a"  # a token that decoders write as it is


MAX_IDS = 2**24
"""More than any vocabulary has; a stranger's file may claim an id for which no memory suffices."""


def read_definition(path: Path) -> dict[str, Any]:
    """A tokenizer's definition, without what makes the ids depend on anything but the text.

    Dropout draws merges at random, and a file may carry a model's context length, to which texts would be cut.

    Raises:
        DataError: it is no such file.
    """
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        definition |= {"truncation": None, "padding": None, "added_tokens": definition.get("added_tokens") or []}
        if definition["model"].get("dropout") is not None:
            definition["model"]["dropout"] = None
        if not all(type(token) is int and 0 <= token < MAX_IDS for token in vocabulary(definition).values()):
            raise ValueError(f"an id is no number from 0 to {MAX_IDS - 1}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error!r})") from error
    return dict(definition)


def vocabulary(definition: Mapping[str, Any]) -> dict[str, int]:
    """The id of each token, added ones included."""
    vocab = definition["model"]["vocab"]  # by name or, for unigram models, a list with scores
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in definition["added_tokens"]}


def special_token_(definition: dict[str, Any], token: int) -> dict[str, Any]:
    """Make a token a special one, which no text becomes, and return its entry among the added tokens."""
    added: list[dict[str, Any]] = definition["added_tokens"]
    for entry in added:
        if entry["id"] == token:
            entry["special"] = True
            return entry
    name = next(name for name, index in vocabulary(definition).items() if index == token)
    added.append({"id": token, "content": name, **PLAIN_TOKEN, "special": True})
    return added[-1]


def without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, but one that puts no space in front of a text."""
    changed: dict[str, Any] = json.loads(json.dumps(definition))
    for step in [*steps_of(changed, "normalizer"), *steps_of(changed, "pre_tokenizer")]:
        if step["type"] == "Prepend":
            step["prepend"] = ""
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return changed


def decoder_kinds(definition: dict[str, Any]) -> set[str]:
    """Types of all steps of the decoder; empty if it has none, and tokens are joined with spaces."""
    return {step["type"] for step in steps_of(definition, "decoder")}


def steps_of(definition: Mapping[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """The steps of a part, those inside of sequences one after the other."""
    waiting = [definition.get(part)]
    while waiting:
        if step := waiting.pop(0):
            yield step
            inside = ("normalizers", "pretokenizers", "processors", "decoders")
            waiting += [each for key in inside for each in step.get(key, ())]


def bytes_of_tokens(model: "Tokenizer", definition: dict[str, Any], vocab_size: int) -> "NDArray[np.int32]":
    """The UTF-8 bytes that the decoder writes for each token between others, shape [vocab_size]; 0 for special ones.

    The decoder itself writes each token between two others, so that marks of spaces, words and continuations count as
    the text that they stand for.
    """
    import numpy as np
    from tokenizers import pre_tokenizers

    sizes = np.zeros(vocab_size, np.int32)
    kinds = decoder_kinds(definition)
    byte_characters = set(pre_tokenizers.ByteLevel.alphabet())

    def write(*tokens: str) -> int:
        text = " ".join(tokens) if model.decoder is None else model.decoder.decode(list(tokens))
        return len(text.encode())

    around = write(NEUTRAL, NEUTRAL)
    for piece, token in vocabulary(definition).items():
        if "ByteLevel" in kinds and byte_characters.issuperset(piece):
            sizes[token] = len(piece)  # each byte is one printable character, and need not be a whole one of the text
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            sizes[token] = 1
        else:
            sizes[token] = write(NEUTRAL, piece, NEUTRAL) - around
    unknown = vocabulary(definition).get(definition["model"].get("unk_token"))
    if unknown is not None:  # a model may name one that its vocabulary lacks, and then never gives it
        sizes[unknown] = 0
    if (unknown_id := definition["model"].get("unk_id")) is not None:
        sizes[unknown_id] = 0
    for added in definition["added_tokens"]:
        if added.get("special"):
            sizes[added["id"]] = 0
    return sizes
