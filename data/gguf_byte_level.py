"""Byte-level BPE tokenizers in GGUF files, for llama.cpp's tokenizer `gpt2`: written, and read back.

llama.cpp has the merges and the tokens from the file, but how a text is divided into words before that is a name there,
`tokenizer.ggml.pre`, for code of its own. The table below has the divisions that published families of models use. A
tokenizer that divides in another way is refused: its merges alone would give other tokens without a word.

Special tokens of the tokenizer are control tokens here, which llama.cpp finds in a prompt where a program asks for it,
as those that apply a chat template do. Other added tokens are found in every text, as in training. llama.cpp does not
normalize: a text that is not in NFC may become other tokens with a tokenizer that brings texts into this form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import DataError
from data.sentencepiece_model import CONTROL, NORMAL, USER_DEFINED
from data.tokenizer_definition import steps_of, vocabulary

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama3": rf"{CONTRACTIONS}\p{{N}}{{1,3}}{SPACES}", "qwen2": rf"{CONTRACTIONS}\p{{N}}{SPACES}"}
"""Patterns that divide texts: of GPT-4 and Llama 3, and of Qwen 2."""


def _byte_level(*before: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of a pre-tokenizer that ends with bytes as characters, with GPT-2's division if nothing else divides."""
    divides = not any(step["type"] == "Split" for step in before)
    return [*before, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": divides}]


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False}


DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[tuple[str, bool], list[dict[str, Any]]] = {
    ("gpt-2", False): _byte_level(),
    ("smollm", False): _byte_level(DIGITS),
    ("llama-bpe", True): _byte_level(_split("llama3")),
    ("dbrx", False): _byte_level(_split("llama3")),
    ("qwen2", False): _byte_level(_split("qwen2")),
}
"""llama.cpp's name of a division, and whether a word that is a token stays whole though merges do not make it."""


def byte_level_vocabulary(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a tokenizer, without those of single tokens.

    Args:
        definition: of a `tokenizer.json`.

    Raises:
        ValueError: llama.cpp would tokenize text differently.
    """
    pre = _division(definition)
    model, ids = definition["model"], vocabulary(definition)
    names = {token: name for name, token in ids.items()}
    tokens = [names.get(token) for token in range(max(names) + 1)]
    if None in tokens:
        raise ValueError(f"no token has the id {tokens.index(None)}")
    types = [NORMAL] * len(tokens)
    for added in definition["added_tokens"]:
        if any(added.get(key) for key in ("lstrip", "rstrip", "single_word")) and not added.get("special"):
            raise ValueError(f"the added token {added['content']!r} takes spaces or words around it along")
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def _division(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's division into words.

    Raises:
        ValueError: it has none.
    """
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"is a {model.get('type')} model of characters, not byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"has a {key}")
    if _steps(definition, "normalizer") not in ([], [{"type": "NFC"}]):
        raise ValueError("changes texts before it divides them, other than to NFC")
    steps = [
        step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {})  # which decides about no token
        for step in _steps(definition, "pre_tokenizer")
    ]
    ignores_merges = bool(model.get("ignore_merges"))
    for (name, keeps_whole), expected in PRE_TOKENIZERS.items():
        if steps == expected and keeps_whole == ignores_merges:
            return name
    raise ValueError(
        f"divides texts into words in a way of its own; llama.cpp's ways that are known here are "
        f"{', '.join(name for name, _ in PRE_TOKENIZERS)}"
    )


def _steps(definition: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return [step for step in steps_of(definition, part) if step["type"] != "Sequence"]


def byte_level_definition(
    pre: object, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], size: int
) -> dict[str, Any]:
    """The definition of a `tokenizer.json` that a vocabulary comes from; the reverse of `byte_level_vocabulary`.

    Args:
        pre: llama.cpp's name of the division into words.
        tokens: of the vocabulary.
        merges: pairs of tokens, with a space between them.
        types: of tokens.
        size: without the rows at the end that are no tokens.

    Raises:
        DataError: the name is none that is known here.
    """
    found = next(((name, whole) for name, whole in PRE_TOKENIZERS if name == pre), None)
    if found is None:
        known = ", ".join(name for name, _ in PRE_TOKENIZERS)
        raise DataError(f"tokenizer.ggml.pre {pre!r} divides texts in a way that is not known here; {known} are")
    added = [
        {"id": place, "content": name, "special": kind != USER_DEFINED, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for place, (name, kind) in enumerate(zip(tokens[:size], types, strict=False))
        if kind != NORMAL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[found]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": found[1],
            "vocab": {name: place for place, name in enumerate(tokens[:size])},
            "merges": [list(merge.split(" ", 1)) for merge in merges],
        },
    }
