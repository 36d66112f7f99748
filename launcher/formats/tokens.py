"""The tokens of an exported model: as in training, or as the program that has trained the model makes them.

Tritrain trains on texts after the end of a document, and knows no other special token, but for those of a chat template
if it has trained on chats. A model of another program may begin texts with another token, or with none, and has those
of its chat template.
"""

from pathlib import Path

from data.chat_template import ChatTemplate
from data.errors import DataError
from data.gguf_vocabulary import gguf_vocabulary
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_json import tokenizer_files
from data.transformers_files import chat_template, has_settings, own_files, puts_first_token
from launcher.checkpoint.folders import CHAT_TEMPLATE
from launcher.checkpoint.location import to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.formats.hf_source import CONFIG, read_json
from launcher.formats.opened import Exportable, tokenizer_of
from launcher.formats.published_source import PublishedSource
from model.config import ModelConfig

NAMED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of `config.json` that name tokens."""


def first_token_of(source: Source, end_of_document: int | None) -> int | None:
    """The token before a text that has nothing else before it, in generation, perplexity and tasks alike.

    A folder or file of other programs may name it. In training a document comes after the end of another. Whether it
    is in front of every text: `puts_first`.
    """
    return end_of_document if source.first_token is None else source.first_token


def puts_first(source: Source, tokenizer: Path) -> bool:
    """Return whether a model's tokenizer puts the first token in front of every text.

    Many name such a token and put it nowhere, as those of Qwen. Where nobody says, it is as in training.

    Args:
        source: of the model.
        tokenizer: the tokenizer's file.

    Raises:
        DataError: a file beside it cannot be read.
    """
    if source.puts_first_token is not None:
        return source.puts_first_token
    if isinstance(source, CheckpointReader):
        # Chats were trained on as the template writes them, and programs put the token in front of a whole chat too.
        return not _was_trained_on_chats(source, tokenizer)
    if source.first_token is None and not has_settings(tokenizer.parent):
        return True
    return puts_first_token(tokenizer.parent)


def fitting_tokenizer(path: str | Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a model.

    Raises:
        DataError: it cannot be read, or has tokens that the model does not have.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; it is the "
            "tokenizer of another model. Name the right one with --tokenizer"
        )
    return tokenizer


def foreign_folder(exportable: Exportable, tokenizer: Path) -> Path | None:
    """The folder of Hugging Face with the tokenizer of a model that Tritrain has not trained; None for any other."""
    if isinstance(exportable.source, CheckpointReader):
        return None
    return tokenizer.parent if has_settings(tokenizer.parent) else None


def own_template(exportable: Exportable, tokenizer: Path) -> ChatTemplate | None:
    """The template of the chats that Tritrain has trained a model on, or that a GGUF file has; None of any other model.

    Raises:
        DataError: it cannot be read.
    """
    source = exportable.source
    is_file = isinstance(source, PublishedSource) and not has_settings(tokenizer.parent)
    has_template = is_file and tokenizer.with_name(CHAT_TEMPLATE).is_file()
    return ChatTemplate(load_tokenizer(tokenizer)) if has_template or _was_trained_on_chats(source, tokenizer) else None


def _was_trained_on_chats(source: Source, tokenizer: Path) -> bool:
    is_trained = isinstance(source, CheckpointReader) and CHAT_TEMPLATE in source.manifest.files
    return is_trained and tokenizer.with_name(CHAT_TEMPLATE).is_file()


def named_tokens(source: Source) -> dict[str, object]:
    """The keys of `config.json` that name tokens, of a model whose tokenizer is not written; empty if nobody says them.

    Raises:
        CheckpointError: the source's `config.json` is damaged.
        DataError: its tokenizer cannot be read.
    """
    if not isinstance(source, CheckpointReader) and (named := _named_in(to_location(source.location))):
        return named
    if (tokenizer := tokenizer_of(source)) is None:
        return {}
    end = load_tokenizer(tokenizer).end_of_document
    return {"bos_token_id": first_token_of(source, end), "eos_token_id": end}


def folder_tokens(exportable: Exportable, tokenizer: Path | None) -> tuple[dict[str, object], dict[str, bytes]]:
    """The keys of `config.json` that name tokens, and the tokenizer's files by name.

    Args:
        exportable: the model.
        tokenizer: the tokenizer's file; None leaves it out.

    Raises:
        CheckpointError: `config.json` beside the tokenizer is damaged.
        DataError: the tokenizer cannot be expressed exactly, or is of another model.
    """
    if tokenizer is None:
        return {}, {}
    model = exportable.model
    end = fitting_tokenizer(tokenizer, model).end_of_document
    first = first_token_of(exportable.source, end)
    named: dict[str, object] = {"bos_token_id": first, "eos_token_id": end}
    folder = foreign_folder(exportable, tokenizer)
    if folder is None:
        length, template = model.max_sequence_length, own_template(exportable, tokenizer)
        files = tokenizer_files(
            tokenizer,
            vocab_size=model.vocab_size,
            max_sequence_length=length,
            first_token=first,
            template=template,
            puts_first_token=puts_first(exportable.source, tokenizer),
        )
        return named, files
    return named | _named_in(folder), own_files(folder)


def _named_in(folder: Path) -> dict[str, object]:
    """The keys of a folder's `config.json` that name tokens; empty if it has none."""
    if not (folder / CONFIG).is_file():
        return {}
    config = read_json(folder / CONFIG)
    return {key: config[key] for key in NAMED if key in config}


def gguf_tokens(exportable: Exportable, tokenizer: Path) -> dict[str, object]:
    """The keys `tokenizer.*` of a GGUF file.

    Args:
        exportable: the model.
        tokenizer: the tokenizer's file.

    Raises:
        DataError: llama.cpp would tokenize differently.
    """
    folder, template = foreign_folder(exportable, tokenizer), own_template(exportable, tokenizer)
    vocabulary = gguf_vocabulary(
        tokenizer,
        exportable.model.vocab_size,
        first_token=exportable.source.first_token,
        puts_first_token=puts_first(exportable.source, tokenizer),
        has_special=folder is not None or template is not None,
    )
    if template is not None:
        text: str | None = template.self_contained()
        others = template.end_tokens() - {vocabulary["eos_token_id"]}
        vocabulary |= {"eot_token_id": min(others)} if others else {}
    else:
        text = None if isinstance(exportable.source, CheckpointReader) else chat_template(tokenizer.parent)
    keys: dict[str, object] = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    return keys if text is None else keys | {"tokenizer.chat_template": text}
