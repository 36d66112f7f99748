"""Small tokenizers of every kind, made as published ones are, with the libraries themselves as oracles.

Each is trained once in a process.
"""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from texts import TEXTS
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

MARK = "\u2581"
LINES = [line for text in TEXTS[:8] for line in text.splitlines()]
LINES += ["Ünïcödé 日本語 é😀 2026", "the cat sat on the mat " * 9]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Oracle(NamedTuple):
    """A tokenizer as its own library runs it."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def sentencepiece_tokenizer(path: Path, **settings: Any) -> Oracle:
    """Train a SentencePiece model."""
    path.write_bytes(_trained_sentencepiece(json.dumps(settings)))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return Oracle(model.encode, model.decode)


@functools.cache
def _trained_sentencepiece(settings: str) -> bytes:
    file = io.BytesIO()
    defaults = {
        "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=file, **(defaults | json.loads(settings))
    )
    return file.getvalue()


def library_tokenizer(
    path: Path,
    model: Any,
    *,
    end: str,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    decoder: Any = None,
    first: tuple[str, ...] = (),
    **changes: Any,
) -> Oracle:
    """Train a tokenizer of the `tokenizers` library; `first` are ordinary tokens, and `changes` are of its model."""
    tokenizer = tokenizers.Tokenizer(model)
    for part, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if value is not None:
            setattr(tokenizer, part, value)
    settings: dict[str, Any] = {"vocab_size": 700, "show_progress": False, "special_tokens": ["<unk>", *first]}
    if isinstance(model, models.Unigram):
        settings["unk_token"] = "<unk>"
    if isinstance(decoder, decoders.ByteLevel):
        settings["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = {
        models.BPE: trainers.BpeTrainer, models.Unigram: trainers.UnigramTrainer,
        models.WordPiece: trainers.WordPieceTrainer, models.WordLevel: trainers.WordLevelTrainer,
    }[type(model)]  # fmt: skip
    if isinstance(model, models.BPE) and model.end_of_word_suffix:
        settings["end_of_word_suffix"] = model.end_of_word_suffix
    tokenizer = tokenizers.Tokenizer.from_str(_trained(tokenizer.to_str(), trainer, json.dumps(settings)))
    tokenizer.add_special_tokens([end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in first]
    definition["model"] |= changes
    path.write_text(json.dumps(definition))
    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.encode_special_tokens = True
    return Oracle(
        lambda text: loaded.encode(text, add_special_tokens=False).ids,
        lambda ids: loaded.decode(ids, skip_special_tokens=False),
    )


@functools.cache
def _trained(untrained: str, trainer: Callable[..., Any], settings: str) -> str:
    tokenizer = tokenizers.Tokenizer.from_str(untrained)
    tokenizer.train_from_iterator(LINES, trainer(**json.loads(settings)))
    return str(tokenizer.to_str())


def byte_level(path: Path, end: str, *before: Any, prefix: bool = False, regex: bool = True, **parts: Any) -> Oracle:
    """Byte-level BPE, with other steps before it."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return library_tokenizer(
        path, models.BPE(), end=end, pre_tokenizer=pre_tokenizers.Sequence([*before, last]),
        decoder=decoders.ByteLevel(), **parts,
    )  # fmt: skip


def byte_level_family(path: Path, family: str) -> Oracle:
    """Byte-level BPE that divides texts as a family of published models does, by llama.cpp's name for it."""
    digits, nfc = pre_tokenizers.Digits(individual_digits=True), normalizers.NFC()
    match family:
        case "gpt-2":
            return byte_level(path, "<|endoftext|>")
        case "smollm":
            return byte_level(path, "<|endoftext|>", digits)
        case "qwen2":
            one_digit = LLAMA3.replace("{1,3}", "")
            return byte_level(path, "<|endoftext|>", split(one_digit), regex=False, normalizer=nfc)
    whole = family == "llama-bpe"
    return byte_level(path, "<|end_of_text|>", split(LLAMA3), regex=False, ignore_merges=whole)


def byte_fallback(path: Path, end: str, *decoder: Any, **parts: Any) -> Oracle:
    """BPE that spells spaces U+2581 and falls back to bytes."""
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *decoder]
    return library_tokenizer(
        path, models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True), end=end, first=tuple(BYTES),
        decoder=decoders.Sequence(steps), **parts,
    )  # fmt: skip


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def metaspace(path: Path, scheme: str) -> Oracle:
    """A unigram model with Metaspace."""
    space = {"prepend_scheme": scheme}
    return library_tokenizer(
        path, models.Unigram(), end="</s>", pre_tokenizer=pre_tokenizers.Metaspace(**space),
        decoder=decoders.Metaspace(**space),
    )  # fmt: skip


LOSSLESS: dict[str, Callable[[Path], Oracle]] = {
    "bpe.model": lambda path: sentencepiece_tokenizer(path, add_dummy_prefix=False),
    "llama2.model": lambda path: sentencepiece_tokenizer(path, add_dummy_prefix=True),
    "unigram.model": lambda path: sentencepiece_tokenizer(path, model_type="unigram", add_dummy_prefix=False),
    "unigram-prefix.model": lambda path: sentencepiece_tokenizer(path, model_type="unigram"),
    "gemma.model": lambda path: sentencepiece_tokenizer(
        path, add_dummy_prefix=False, user_defined_symbols=["<mask>", "\n\n"], split_digits=True
    ),
    "gpt2.json": lambda path: byte_level(path, "<|endoftext|>"),
    "gpt2-prefix.json": lambda path: byte_level(path, "<|endoftext|>", prefix=True),
    "llama3.json": lambda path: byte_level(path, "<|end_of_text|>", split(LLAMA3), regex=False, ignore_merges=True),
    "deepseek.json": lambda path: byte_level(
        path, "<\uff5cend▁of▁sentence\uff5c>", split("[\r\n]"), split(r"\s?\p{L}+"),
        pre_tokenizers.Digits(individual_digits=True), regex=False,
    ),
    "llama2.json": lambda path: byte_fallback(
        path, "</s>", decoders.Strip(" ", 1, 0),
        normalizer=normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]),
    ),
    "mistral.json": lambda path: byte_fallback(
        path, "</s>", decoders.Strip(" ", 1, 0),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    ),
    "gemma.json": lambda path: byte_fallback(path, "<eos>", normalizer=normalizers.Replace(" ", MARK)),
}  # fmt: skip
"""By file name: those that give any text back."""

LOSSY: dict[str, Callable[[Path], Oracle]] = {
    "t5.model": lambda path: sentencepiece_tokenizer(
        path, model_type="unigram", byte_fallback=False, vocab_size=400, normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    ),
    "nfkc.model": lambda path: sentencepiece_tokenizer(path, normalization_rule_name="nfkc"),
    "suffix.model": lambda path: sentencepiece_tokenizer(path, treat_whitespace_as_suffix=True),
    "qwen.json": lambda path: byte_level(
        path, "<|endoftext|>", split(LLAMA3), regex=False, normalizer=normalizers.NFC()
    ),
    "always.json": lambda path: metaspace(path, "always"),
    "first.json": lambda path: metaspace(path, "first"),
    "never.json": lambda path: metaspace(path, "never"),
    "bert.json": lambda path: library_tokenizer(
        path, models.WordPiece(unk_token="<unk>"), end="[EOS]", normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece(cleanup=False),
    ),
    "clip.json": lambda path: library_tokenizer(
        path, models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), end="<|endoftext|>",
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(), decoder=decoders.BPEDecoder(),
    ),
    "words.json": lambda path: library_tokenizer(
        path, models.WordLevel(unk_token="<unk>"), end="</s>", pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ),
}  # fmt: skip
"""Those that give some texts back: that are normalized, in known characters, with one space between words."""
