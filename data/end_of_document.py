"""Find the token that ends a document.

Published tokenizers name it in different places. The first of these that names one decides:

1. the user;
2. the file itself, if `prepare` has marked the token there;
3. files in the same folder: `tokenizer_config.json` and `special_tokens_map.json` (`eos_token`),
   `generation_config.json` and `config.json` (`eos_token_id`), or the manifest of prepared data (`end_of_document`);
4. the file itself: the end-of-sentence piece of a SentencePiece model, or the one special token of a `tokenizer.json`
   that has a usual name. If several have one, it is the first of `USUAL_NAMES` in the folder of a run or a checkpoint:
   earlier versions trained with that one and did not mark it.

Where the place that decides names several tokens, and not exactly one of them has a usual name, nothing is guessed.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.errors import DataError
from data.transformers_files import json_object

USUAL_NAMES = (
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<|end▁of▁sentence|>",
    "<\uff5cend▁of▁sentence\uff5c>",
)  # fmt: skip
"""Names under which published tokenizers keep the token that ends a document, most common first."""
NAMING_FILES = {
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
    "generation_config.json": "eos_token_id",
    "config.json": "eos_token_id",
    "manifest.json": "end_of_document",
}
"""Files beside a tokenizer's that may name the token, and the key there."""
FIRST_OF_A_RUN = b"tritrain_version:"
"""The beginning of the `config.yaml` of a run, and of each of its checkpoints."""
HOW_TO_SAY = (
    "name it with data.prepare.end_of_document (--end-of-document), or as eos_token in a tokenizer_config.json in the "
    "tokenizer's folder"
)


def find_end_of_document(
    path: Path,
    chosen: str | None,
    own: Sequence[str],
    *,
    is_marked: bool,
    special: Sequence[str],
    id_of: Callable[[str | int], int | None],
) -> int:
    """Return the id of the token that ends a document; see the top of this file.

    Args:
        path: the tokenizer's file.
        chosen: the token that the user names.
        own: the tokens that the file itself names.
        is_marked: whether `own` was marked by `prepare`.
        special: the special tokens in the file, for the message.
        id_of: gives the id of a token by its name or id, None if the vocabulary does not have it.

    Raises:
        DataError: none, several or an unknown token is named.
    """
    for place, named in _named(path, chosen, own, is_marked):
        ids = {name: id_of(name) for name in named}
        if unknown := [name for name, token in ids.items() if token is None]:
            raise DataError(
                f"{place}: says that {unknown[0]!r} ends a document, but {path} has no such token; {HOW_TO_SAY}"
            )
        found = {token for token in ids.values() if token is not None}
        usual = {token for token in map(id_of, USUAL_NAMES) if token in found}
        if len(found) > 1 and len(usual) != 1:
            raise DataError(f"{place}: any of {list(ids)} may end a document; {HOW_TO_SAY}")
        return (found if len(found) == 1 else usual).pop()
    raise DataError(
        f"{path}: no token ends a document: none of its special tokens {list(special)} is one of {list(USUAL_NAMES)}; "
        f"{HOW_TO_SAY}"
    )


def _named(
    path: Path, chosen: str | None, own: Sequence[str], is_marked: bool
) -> Iterator[tuple[str, Sequence[str | int]]]:
    """Places that name tokens, in the order in which they are believed, with the names or ids there."""
    if chosen is not None:
        yield "end_of_document", [chosen]
    if is_marked:
        yield str(path), own
    for name, key in NAMING_FILES.items():
        file = path.with_name(name)
        value = json_object(file).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        values = value if isinstance(value, list) else [value]
        kind = str if key == "eos_token" else int  # a name that looks like an id may be another token's
        if named := [each for each in values if type(each) is kind]:
            yield str(file), named
    if own:
        yield str(path), own[:1] if _is_of_a_run(path) else own


def _is_of_a_run(path: Path) -> bool:
    """Return whether a file is the copy in the folder of a run or of a checkpoint, beside its `config.yaml`."""
    config = path.with_name("config.yaml")
    if not config.is_file():
        return False
    with config.open("rb") as file:
        return file.read(len(FIRST_OF_A_RUN)) == FIRST_OF_A_RUN
