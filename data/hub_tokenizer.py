"""Fetch the tokenizer of a model on the Hugging Face hub, `hf:NAME` or `hf:NAME@REVISION`.

Only the files that describe a tokenizer are fetched, from the top of the repository and by their usual names; no code
is. They stay in the hub's cache, which serves without a network too.
"""

import re
from pathlib import Path

from data.errors import DataError
from data.survey import HF_PREFIX
from data.transformers_files import TOKENIZER_FILES
from data.urls import redacted

HUB_SPEC = re.compile(rf"{HF_PREFIX}([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
FILES = (*TOKENIZER_FILES, "config.json")
"""`config.json` may name the token that ends documents."""


def is_on_hub(tokenizer: str) -> bool:
    """Return whether a tokenizer is named by its model on the hub."""
    return tokenizer.startswith(HF_PREFIX)


def fetch_tokenizer(spec: str) -> Path:
    """Return a folder with the files of a tokenizer on the hub.

    Args:
        spec: `hf:NAME` or `hf:NAME@REVISION`.

    Raises:
        DataError: it is not such a name, or cannot be fetched.
    """
    import huggingface_hub

    matched = HUB_SPEC.fullmatch(spec)
    if matched is None:
        raise DataError(f"{spec}: write a tokenizer on the hub as {HF_PREFIX}NAME, or {HF_PREFIX}NAME@REVISION")
    try:
        folder = huggingface_hub.snapshot_download(matched[1], revision=matched[2], allow_patterns=list(FILES))
    except Exception as error:  # the hub, the network and the cache each have their own kinds
        lines = redacted(str(error)).strip().splitlines() or [""]
        raise DataError(
            f"{spec}: cannot be fetched ({type(error).__name__}: {lines[0]}); check the name and the network, and "
            "HF_TOKEN for a private or gated model"
        ) from error
    if not Path(folder).is_dir():  # none of the files is in the repository
        raise DataError(f"{spec}: has no tokenizer.model and no tokenizer.json")
    return Path(folder)
