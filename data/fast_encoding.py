"""Encode with `fastokens` where it is installed and gives the ids of the tokenizer's own library.

It is an optional package (`pip install -e '.[fast]'`) that reads a `tokenizer.json` and encodes many times as fast.
That its ids are the same is not taken on trust: before the work, texts that libraries disagree about are encoded by
both, and a tokenizer for which they differ is left to its own library. During the work, the beginning of each piece of
work is encoded by both, and a difference is an error.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Protocol

from data.errors import DataError

NAME = "fastokens"
PROBES = (
    *("a", " a", "a ", "  ", "\n", "\n\n  \t x", "The cat's 1234567 hats, don't; we'LL see!", "x" * 300, " " * 300),
    *("Ünïcödé é e\u0301 日本語 한국어 العربية 😀👩\u200d👧 ﬁ", "\u00a0\u200b\u2028\ufeff\x00\x7f", "İı ǅ ß ﷺ Ж"),
    *("def f(x):\n    return {x: [1.5e-3]}\r\n", "http://a.b/c?d=e&f=%20 ~~~~ ---- ...."),
    *("<s></s> <|endoftext|> [CLS] <unk> <0x0A>", "ein Satz   mit  Lücken\t\tund 12,345.67 €"),
)
"""Texts about which libraries disagree."""
COMPARED_TEXTS, COMPARED_CHARS = 8, 1 << 11
"""Of the texts that are encoded at a time, the first ones, up to this many characters of each, are encoded by both."""

Encode = Callable[[list[str]], list[list[int]]]


class Definable(Protocol):
    """A tokenizer that may be one of `fastokens`."""

    def definition_of_pieces(self) -> dict[str, Any] | None:
        """A `tokenizer.json` that encodes as `encode_pieces` does; None, or a DataError, if there is none."""

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Return the ids of texts, without what is put in front of a document."""


class FastEncoder:
    """A tokenizer of `fastokens`, compared with one whose ids are right.

    Args:
        definition: of a `tokenizer.json`.
        exact: gives the right ids.
    """

    def __init__(self, definition: dict[str, Any], exact: Encode) -> None:
        import fastokens

        self._model = fastokens.Tokenizer.from_json_str(json.dumps(definition))
        self._exact = exact
        self._spelled = _names_no_text_becomes(definition)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; the name of a special token in it is just text."""
        import numpy as np

        spelling = {place for place, text in enumerate(texts) if self._spelled and self._spelled.search(text)}
        others = [text for place, text in enumerate(texts) if place not in spelling]
        content, ends = self._model.encode_batch_flat(others, split_special_tokens=True)
        ids, places = np.frombuffer(content, np.uint32).tolist(), np.frombuffer(ends, np.uint64).tolist()
        fast = iter([ids[begin:end] for begin, end in pairwise(places)])
        exact = iter(self._exact([texts[place] for place in sorted(spelling)]) if spelling else [])
        return [next(exact if place in spelling else fast) for place in range(len(texts))]

    def encode_compared(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, and compare the beginning of the texts.

        Raises:
            DataError: the ids are not those of the other library.
        """
        sample = [text[:COMPARED_CHARS] for text in texts[:COMPARED_TEXTS]]
        for text, fast, right in zip(sample, self.encode(sample), self._exact(sample), strict=True):
            if fast != right:
                at = next((at for at, pair in enumerate(zip(fast, right, strict=False)) if pair[0] != pair[1]), -1)
                raise DataError(
                    f"{NAME} {version(NAME)} encodes a text in another way than the tokenizer's own library (token "
                    f"{at} of {text[:60]!r}...); uninstall {NAME} and prepare the text again"
                )
        return self.encode(texts)


def _names_no_text_becomes(definition: dict[str, Any]) -> re.Pattern[str] | None:
    """A pattern of the names of tokens that no merges make, such as `<0x0A>`.

    `fastokens` takes them in a text for these tokens, so texts with one are left to the other library.
    """
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        return None
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    names = {name for name in model["vocab"] if len(name) > 1} - {left + right for left, right in merges}
    return re.compile("|".join(map(re.escape, sorted(names)))) if names else None


def fast_encoder(tokenizer: Definable) -> FastEncoder | None:
    """Return the encoder of `fastokens` for a tokenizer; None if it is not installed, or its ids are others."""
    if importlib.util.find_spec(NAME) is None:
        return None
    try:
        definition = tokenizer.definition_of_pieces()
        encoder = FastEncoder(definition, tokenizer.encode_pieces) if definition else None
        is_equal = encoder and encoder.encode(PROBES) == tokenizer.encode_pieces(list(PROBES))
        return encoder if is_equal else None
    except BaseException as error:  # a kind of tokenizer that it does not know; or a panic, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return None
