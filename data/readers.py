"""Read documents from files, folders, Hugging Face data sets and the quickstart corpus.

An input is one of:

| input | documents |
| --- | --- |
| `FILE.txt`, `.md`, `.rst`, `.py` | the whole file |
| `FILE.jsonl`, `.jsonl.zst`, `.jsonl.gz` | the value of `text` of each line |
| `FILE.parquet` | the column `text`, row by row |
| `FILE.idx` | the documents of Megatron's `FILE.bin`, which are tokens |
| `FILE.ds` | the documents of datatrove's token file |
| `PREPARED/train` | the documents of a split of prepared data, decoded |
| `FOLDER` | every file of these kinds in it, recursively, in the order of their paths; `survey` lists the others |
| `hf:NAME[:CONFIG]:SPLIT` | the column `text` of a data set that `datasets` can stream |
| `hf:NAME[:CONFIG]:SPLIT[:N]` | its first N rows: the brackets are written, as in `hf:NAME:train[:1000]` |
| `python-stdlib` | the source files of Python's standard library |

Chats are in the same places, in JSON lines, Parquet files and data sets, with `messages` instead of `text`: a document
is then a conversation in JSON (`data.chats`).

Everything is read as a stream, in a fixed order, and nothing is guessed: what cannot be read is an error that names the
file and the line. Empty documents are left out.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, Literal

from data import quickstart_corpus
from data.chat_records import MESSAGES_KEY, TOOLS_KEY, chat_of, without_nulls
from data.config import Content
from data.documents import READ_BYTES, Document
from data.errors import DataError
from data.pair_records import PROMPT_KEY, SIDES, pair_of
from data.pointers import pointer_problem
from data.prepared import INDEX
from data.survey import Survey, split_hub_name, suffix_of, survey

TEXT_KEY = "text"
MAX_ZSTD_WINDOW_BYTES = 2**31  # files written with `zstd --long` need more than the decoder's default of 128 MiB
PARQUET_BATCH_ROWS = 256
MAX_LISTED_KEYS = 20
WHOLE_BYTES = 1 << 24
"""A text file of more is read in blocks."""

Place = tuple[int, int]
"""The number of a file, or of an input that is none, and the number of a document in it, both from 0."""


TextOf = Callable[[Any, str], str]
"""Gives the text of a record, whose origin it names in errors."""


def read_documents(inputs: Sequence[str], found: Survey | None = None) -> Iterator[Document]:
    """Yield the documents of all inputs, one input after the other; see the top of this file for what an input is.

    Args:
        inputs: names.
        found: their `survey`, so that folders are not listed again.

    Raises:
        DataError: an input does not exist, is of no known kind, is broken, or they hold no text at all.
    """
    return (document for _, document in placed_documents(inputs, found or survey(inputs)))


def placed_documents(
    inputs: Sequence[str],
    found: Survey,
    *,
    start: Place = (0, 0),
    first_file: int = 0,
    content: Content | Literal["examples"] = "text",
    stop: int | None = None,
) -> Iterator[tuple[Place, Document]]:
    """As `read_documents`, with the place of each document.

    Args:
        inputs: names.
        found: their `survey`.
        start: the place to begin at; earlier files are not opened.
        first_file: number of the first file.
        content: what the inputs hold.
        stop: number of the first file that is not read; None: read to the end.

    Raises:
        DataError: as `read_documents`; that there is no text at all, only if all is read.
    """
    is_empty = start <= (first_file, 0) and stop is None
    for number, (source, path) in enumerate(units(inputs, found), start=first_file):
        if number < start[0]:
            continue
        if stop is not None and number >= stop:
            break
        skipped = start[1] if number == start[0] else 0
        for row, document in enumerate(islice(_read_unit(source, path, content), skipped, None), start=skipped):
            if document.is_empty:
                continue
            if isinstance(document.content, str) and not document.content.isascii():
                _check_encodable(document.content, document.origin)
            is_empty = False
            yield (number, row), document
    if is_empty:
        raise DataError(f"{', '.join(inputs)}: contains no {content}")


def units(inputs: Sequence[str], found: Survey) -> list[tuple[str, Path | None]]:
    """Each file of the inputs with its input, and each input that is no file, in the order in which they are read."""
    return [(source, path) for source in inputs for path in found.files.get(source, [None])]


def _read_unit(source: str, path: Path | None, content: Content | Literal["examples"]) -> Iterator[Document]:
    keys, text_of = RECORDS[content]
    if path is not None:
        if problem := pointer_problem(path):
            raise DataError(f"{path}: {problem}")
        suffix = suffix_of(path)
        if suffix in RECORD_READERS:
            return RECORD_READERS[suffix](path, keys, text_of)
        if content != "text":
            raise DataError(f"{path}: {content} are read from {' '.join(RECORD_READERS)}, not from {path.name}")
        if path.name == INDEX:
            from data.prepared_text import read_split

            return read_split(path)
        return READERS[suffix](path)
    if source == quickstart_corpus.NAME and content != "text":
        raise DataError(f"{source}: holds text, no {content}")
    if source == quickstart_corpus.NAME:
        return (Document(text, f"{source}/{name}") for name, text in quickstart_corpus.read_standard_library())
    return _read_hugging_face(source, text_of)


def _check_encodable(text: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = ascii(text[error.start])
        raise DataError(
            f"{origin}: contains half of a surrogate pair ({lone}), which is not text; repair it"
        ) from error


def _read_text(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        content = file.read(WHOLE_BYTES + 1)
    try:
        yield Document(path if len(content) > WHOLE_BYTES else content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from error


def _read_jsonl(path: Path, keys: Sequence[str], text_of: TextOf) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from _parse_lines(file, path, text_of)


def _read_jsonl_gz(path: Path, keys: Sequence[str], text_of: TextOf) -> Iterator[Document]:
    _check_has_bytes(path)
    with gzip.open(path, "rb") as file:
        yield from _parse_lines(file, path, text_of)


def _check_has_bytes(path: Path) -> None:
    """A compressed file of nothing still has a header; decompressors take one without as the end of another."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: has 0 bytes, which no compressed file has; fetch it again, or remove it")


def _read_jsonl_zst(path: Path, keys: Sequence[str], text_of: TextOf) -> Iterator[Document]:
    _check_has_bytes(path)
    with path.open("rb") as file:
        yield from _parse_lines(_split_lines(_decompress_zstd(file)), path, text_of)


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the contents of all frames, and raise if the last one is cut, which `stream_reader` would not notice."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    is_inside_frame = False
    while compressed := file.read(READ_BYTES):
        while compressed:
            yield frame.decompress(compressed)
            is_inside_frame = not frame.eof
            compressed = frame.unused_data
            if frame.eof:
                frame = decompressor.decompressobj()
    if is_inside_frame:
        raise EOFError("it ends in the middle of a frame")


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # of a line; joined once, because a line may be long
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        for line in others:
            yield b"".join(begun)
            begun = [line]
    yield b"".join(begun)


def _parse_lines(lines: Iterable[bytes], path: Path, text_of: TextOf) -> Iterator[Document]:
    iterator = iter(lines)
    number = 0
    while True:
        number += 1
        origin = f"{path}:{number}"
        try:
            line = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # each decompressor has its own kind
            what = "decompressed" if path.suffix in (".gz", ".zst") else "read"
            raise DataError(f"{origin}: cannot be {what}; the file is damaged or truncated ({error})") from error
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, or nested by the thousand
            raise DataError(f"{origin}: not JSON: {error}") from error
        yield Document(text_of(record, origin), origin)


def _text_of(record: Any, origin: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f'{origin}: a line must be an object with the key "{TEXT_KEY}", not {type(record).__name__}')
    if TEXT_KEY not in record:
        others = (content for content, key in (("chats", MESSAGES_KEY), ("pairs", SIDES[0])) if key in record)
        advice = "".join(f"; --content {content} of `tritrain prepare` reads such records" for content in others)
        raise DataError(f'{origin}: has no key "{TEXT_KEY}"; its keys are {_listed(record)}{advice}')
    text = record[TEXT_KEY]
    if not isinstance(text, str):
        raise DataError(f'{origin}: "{TEXT_KEY}" is {type(text).__name__}; must be text')
    return text


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text in what JSON can hold, but for the names of keys; those of Parquet's maps come in tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings_in(each)


def _listed(names: Iterable[str]) -> str:
    """Some names, for a message: a stranger's file may have any number of them."""
    known = sorted(names)
    more = f" and {len(known) - MAX_LISTED_KEYS} others" if len(known) > MAX_LISTED_KEYS else ""
    return f"{known[:MAX_LISTED_KEYS]}{more}"


def _read_parquet(path: Path, keys: Sequence[str], text_of: TextOf) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file, or is truncated ({error})") from error
    with file:
        columns = file.schema_arrow.names
        if keys and keys[0] not in columns:
            raise DataError(f'{path}: has no column "{keys[0]}"; its columns are {_listed(columns)}')
        wanted = [key for key in keys or columns if key in columns]
        batches = file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted)
        row = 0
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}:{row + 1}: the file is damaged in this row or after it ({error})") from error
            if batch is None:
                return
            for values in zip(*batch.columns, strict=True):
                row += 1
                origin = f"{path}:{row}"
                try:
                    cells = zip(batch.schema.names, values, strict=True)
                    record = {key: without_nulls(value.as_py()) for key, value in cells}
                except UnicodeDecodeError as error:
                    raise DataError(f"{origin}: byte {error.start} of the text is not UTF-8; repair the row") from error
                yield Document(text_of(record, origin), origin)


def _read_tokens(path: Path) -> Iterator[Document]:
    from data.token_files import read_datatrove, read_megatron

    return read_megatron(path) if suffix_of(path) == ".idx" else read_datatrove(path)


def _read_hugging_face(source: str, text_of: TextOf) -> Iterator[Document]:
    """Stream `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`; NAME may be a folder of data files."""
    (name, *config, split), num_rows = split_hub_name(source)
    import datasets

    try:
        rows = iter(datasets.load_dataset(name, *config, split=split, streaming=True))
    except Exception as error:  # the hub, the network and the builder each have their own kinds
        raise DataError(f"{source}: `datasets` cannot open it ({type(error).__name__}: {error})") from error
    for number in count(1) if num_rows is None else range(1, num_rows + 1):
        origin = f"{source}:{number}"
        try:
            record = next(rows, None)
        except Exception as error:  # as above, and those of every format
            raise DataError(f"{origin}: `datasets` cannot read this row ({type(error).__name__}: {error})") from error
        if record is None:
            return
        yield Document(text_of({key: without_nulls(value) for key, value in record.items()}, origin), origin)


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_text,
    ".idx": _read_tokens,
    ".ds": _read_tokens,
}
"""What reads a file, by the end of its name."""

RECORD_READERS: dict[str, Callable[[Path, Sequence[str], TextOf], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}
"""What reads a file of records, which have a key for what is wanted of them."""

RECORDS: dict[Content | Literal["examples"], tuple[tuple[str, ...], TextOf]] = {
    "text": ((TEXT_KEY,), _text_of),
    "chats": ((MESSAGES_KEY, TOOLS_KEY), chat_of),
    "pairs": ((*SIDES, PROMPT_KEY, TOOLS_KEY), pair_of),
    "examples": ((), lambda record, origin: json.dumps(texts) if (texts := [*strings_in(record)]) else ""),
}
"""The keys of a record that are read, of which it must have the first, or none for all, and what gives its text; of an
example this is the list of all its texts, as JSON."""
