"""The files that Transformers reads a tokenizer from, in the folder of a model that another program has trained.

Such a model knows more special tokens than the end of a document: the one that texts begin with, and those of its chat
template. An export has these files as they are.
"""

import json
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.pointers import pointer_problem
from data.tokenizer_definition import read_definition, steps_of

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE, GENERATION_CONFIG = "chat_template.jinja", "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, "vocab.json"),
    *("merges.txt", CHAT_TEMPLATE, GENERATION_CONFIG),
)
"""Their names, and that of the file that says where generation ends."""


def has_settings(folder: Path) -> bool:
    """Return whether a folder says how Transformers reads the tokenizer in it."""
    return any((folder / name).is_file() for name in (TOKENIZER_CONFIG, "config.json"))


def prefixes_every_part(folder: Path) -> bool:
    """Return whether Transformers puts the dummy prefix of a SentencePiece model after special tokens too.

    It does so for Llama's classes unless their settings say `legacy: false`.

    Raises:
        DataError: the settings cannot be read.
    """
    settings = json_object(folder / TOKENIZER_CONFIG)
    is_llama = str(settings.get("tokenizer_class")) in ("LlamaTokenizer", "LlamaTokenizerFast")
    return is_llama and settings.get("legacy") in (None, True)


def own_files(folder: Path) -> dict[str, bytes]:
    """The files as they are, by name, but without the name of code that would have to be trusted.

    Raises:
        DataError: one cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            try:
                files[name] = (folder / name).read_bytes()
            except OSError as error:
                raise DataError(f"{folder / name}: cannot be read: {error}") from error
    config = json_object(folder / TOKENIZER_CONFIG)
    if config.pop("auto_map", None) is not None:
        files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that files say Transformers adds to a vocabulary, with their ids.

    Raises:
        DataError: a file cannot be read.
    """
    found = {name: token for name, token in json_object(folder / ADDED_TOKENS).items() if type(token) is int}
    decoder = json_object(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    for token, value in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(value, dict) and token.isdecimal():
            found[str(value.get("content"))] = int(token)
    return found


def chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer, a program in Jinja; None if it has none.

    Raises:
        DataError: a file cannot be read.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return template_of_file(folder / CHAT_TEMPLATE)
    named = json_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(named, list):  # several, of which one is for conversations
        named = {each.get("name"): each.get("template") for each in named if isinstance(each, dict)}.get("default")
    return named if isinstance(named, str) else None


def template_of_file(file: Path) -> str:
    """The chat template in a file of its own.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def puts_first_token(folder: Path) -> bool:
    """Return whether Transformers puts the token that begins texts in front of each.

    `add_bos_token` says so, or what the `tokenizer.json` does after a text is divided; a SentencePiece model alone does
    it, as Llama's class for these does.

    Raises:
        DataError: a file cannot be read.
    """
    said = json_object(folder / TOKENIZER_CONFIG).get("add_bos_token")
    if isinstance(said, bool):
        return said
    if not (folder / "tokenizer.json").is_file():
        return True
    steps = steps_of(read_definition(folder / "tokenizer.json"), "post_processor")
    templates = [step.get("single") or [] for step in steps if step.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in template[0] for template in templates if template)


def json_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if there is no such file, or it holds something else.

    Raises:
        DataError: it cannot be read.
    """
    if not file.is_file():
        return {}
    if problem := pointer_problem(file):
        raise DataError(f"{file}: {problem}")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
