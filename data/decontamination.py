"""Find documents that share 13 consecutive words with an example of an evaluation set.

The method is that of GPT-3 (Brown et al. 2020, appendix C): texts are put into lower case, punctuation is deleted,
words are what whitespace separates, and a document is contaminated if 13 words in a row are those of an example. As
GPT-3 did at first, and datatrove does, the whole document is left out. GPT-3 later cut out the passage alone, to keep
long books, which makes texts that nobody wrote. It also ignored n-grams of more than 10 training documents, which a
stream cannot know before its end. Here the wording of a task is ignored: n-grams of more than 10 examples, and of more
than a twentieth of the task's examples.

An example is looked for as its evaluation set has it, each of its texts by itself and in front of each other, such as a
question in front of its answers; and as a task asks it, with words of the task between. An example whose own texts have
no 13 words in a row counts as short: no page quotes it in the words of the task.

Words and n-grams are compared by 64-bit hashes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from data.documents import Document
from data.errors import DataError
from data.new_paths import file_being_replaced
from data.readers import placed_documents
from data.survey import survey

NGRAM_WORDS = 13
COMMON_EXAMPLES, COMMON_SHARE = 10, 1 / 20
"""An n-gram of more examples of a task, and of a larger share of them, is the wording of the task."""
KEPT_TOKENS = 1 << 18
"""Words with their punctuation, whose hashes are kept."""
MOST_WORD_CHARS = 1000
"""Of a longer word, in a text that is read in blocks, the beginning is left out."""
MOST_PAIRED = 16
"""Texts of an example; of more, each is put in front of the next one only."""
SLOTS_FOR_EACH = 8
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Example:
    """An example of an evaluation set."""

    texts: Sequence[str]
    """As the set has them: a question, answers, names of things."""
    prompts: Sequence[str] = ()
    """As a task asks it, with each answer."""


Examples = Mapping[str, Iterable[Example]]
"""Of each evaluation set, by name."""


class _Hashes(dict[str, int]):
    """The hash of a word, by the word with its punctuation; 0 of what is no word."""

    def __missing__(self, token: str) -> int:
        if len(self) >= KEPT_TOKENS:
            self.clear()
        word = token if token.isalnum() else "".join(char for char in token if category(char)[0] not in "PS")
        digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        found = self[token] = (int.from_bytes(digest, "little") or 1) if word else 0
        return found


_hashes = _Hashes()


def _words(text: str) -> NDArray[np.uint64]:
    """The hash of each word of a text."""
    tokens = text.lower().split()
    found = np.fromiter(map(_hashes.__getitem__, tokens), np.uint64, len(tokens))
    return found[found != 0]


def _ngrams(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hash of each n-gram of some consecutive words."""
    count = max(len(words) - NGRAM_WORDS + 1, 0)
    found = np.zeros(count, np.uint64)
    for place in range(NGRAM_WORDS):
        found = found * MULTIPLIER + words[place : place + count]
    return found


def _places(hashes: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The places, in an ascending array, of those hashes that it holds."""
    places = np.minimum(np.searchsorted(ascending, hashes), len(ascending) - 1)
    return places[ascending[places] == hashes]


def _different_ngrams(texts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The hashes of the n-grams within some texts, which are given as words, each once."""
    between = np.zeros(1, np.uint64)  # no word
    words = np.concatenate([np.zeros(NGRAM_WORDS, np.uint64), *(part for text in texts for part in (text, between))])
    is_whole = np.lib.stride_tricks.sliding_window_view(words, NGRAM_WORDS).all(axis=1)
    return np.unique(_ngrams(words)[is_whole])


def _ngrams_of_texts(texts: Sequence[str]) -> NDArray[np.uint64]:
    """The hashes of the n-grams in an example's own texts, and of those that begin in one text and end in another."""
    words = [_words(text) for text in texts]
    pairs = permutations(words, 2) if len(words) <= MOST_PAIRED else pairwise(words)
    beside = (np.concatenate([one[1 - NGRAM_WORDS :], other[: NGRAM_WORDS - 1]]) for one, other in pairs)
    together = np.concatenate([np.zeros(0, np.uint64), *words])
    return _different_ngrams([together, *(both for both in beside if len(both) >= NGRAM_WORDS)])


@dataclass(frozen=True, eq=False)
class NGrams:
    """The n-grams of evaluation sets."""

    names: tuple[str, ...]
    """Of the sets."""
    hashes: NDArray[np.uint64]
    """Of the n-grams, ascending."""
    sets: NDArray[np.uint16]
    """The number of the set that each is of, from 1; of several sets, the first."""
    examples: tuple[int, ...]
    """Of each set."""
    short_examples: tuple[int, ...]
    """Examples of each set whose own texts have no n-gram."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which documents are contaminated, and by which set."""
        content = [self.hashes.tobytes(), self.sets.tobytes(), "\0".join(self.names).encode()]
        return hashlib.sha256(b"".join(content)).hexdigest()

    @cached_property
    def _slots(self) -> NDArray[np.bool_]:
        """Whether any n-gram's hash begins with these bits; few others do, and are looked up."""
        slots = np.zeros(1 << (SLOTS_FOR_EACH * len(self.hashes)).bit_length(), bool)
        slots[self._slot_of(self.hashes, len(slots))] = True
        return slots

    @staticmethod
    def _slot_of(hashes: NDArray[np.uint64], num_slots: int) -> NDArray[np.int64]:
        return (hashes >> np.uint64(65 - num_slots.bit_length())).astype(np.int64)

    def set_of(self, blocks: Iterable[str]) -> int:
        """The number of the evaluation set that a text shares its first n-gram with, from 1; 0 if it shares none.

        Args:
            blocks: the text, in parts of any size.
        """
        before = np.zeros(0, np.uint64)
        for block in _whole_words(blocks):
            words = np.concatenate([before, _words(block)])
            before = words[len(words) - min(NGRAM_WORDS - 1, len(words)) :]
            found = _ngrams(words)
            found = found[self._slots[self._slot_of(found, len(self._slots))]]
            if len(shared := _places(found, self.hashes)):
                return int(self.sets[shared[0]])
        return 0

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        with file_being_replaced(path) as building, building.open("xb") as file:
            np.savez(
                file,
                allow_pickle=False,
                names=np.array(self.names),
                hashes=self.hashes,
                sets=self.sets,
                examples=np.array([self.examples, self.short_examples]),
            )

    @classmethod
    def load(cls, path: Path) -> "NGrams":
        """Read a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            counts = stored["examples"].tolist()
            return cls(tuple(stored["names"].tolist()), stored["hashes"], stored["sets"], *map(tuple, counts))


def _whole_words(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in parts that begin and end with whole words."""
    rest = ""
    for block in blocks:
        text, rest = rest + block, ""
        if text and not text[-1].isspace():
            *before, rest = text.rsplit(None, 1)
            text = before[0] if before else ""
            rest = rest[-MOST_WORD_CHARS:] if not before else rest
        yield text
    yield rest


def ngrams_of(examples: Examples) -> NGrams:
    """The n-grams of evaluation sets.

    Raises:
        DataError: none of the examples of a set has 13 words in a row.
    """
    names, hashes, sets, counts, short = [], [], [], [], []
    for number, (name, of_set) in enumerate(examples.items(), start=1):
        own_texts, found = [], []
        for example in of_set:
            own_texts.append(_ngrams_of_texts(example.texts))
            asked = _different_ngrams([_words(prompt) for prompt in example.prompts])
            found.append(np.union1d(own_texts[-1], asked))
        unique, num_examples = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]), return_counts=True)
        own = unique[num_examples <= max(COMMON_EXAMPLES, len(found) * COMMON_SHARE)]
        if not len(own):
            raise DataError(
                f"{name}: none of its {len(found):,} examples has {NGRAM_WORDS} words in a row of its own; leave it "
                "out, since nothing could be found by it"
            )
        names.append(name)
        hashes.append(own)
        sets.append(np.full(len(own), number, np.uint16))
        counts.append(len(found))
        short.append(sum(not len(_places(each, own)) for each in own_texts))
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    return NGrams(tuple(names), unique, np.concatenate(sets)[first], tuple(counts), tuple(short))


def read_examples(inputs: Sequence[str]) -> dict[str, Iterable[Example]]:
    """The examples in files, folders and data sets: each record is one, with all texts in it whatever their keys.

    Raises:
        DataError: there is no such file.
    """

    def of(documents: Iterable[tuple[Any, Document]]) -> Iterator[Example]:
        return (Example(json.loads(document.text)) for _, document in documents)

    found = survey(inputs)
    return {name: of(placed_documents([name], found, content="examples")) for name in inputs}


def read_ngrams(inputs: Sequence[str]) -> NGrams | None:
    """The n-grams of the examples in files, folders and data sets; None if none are named.

    Raises:
        DataError: there is no such file, or no example in it.
    """
    return ngrams_of(read_examples(inputs)) if inputs else None
