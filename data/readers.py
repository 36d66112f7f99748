"""Read documents from files, folders, Hugging Face data sets and the quickstart corpus.

An input is one of:

| input | documents |
| --- | --- |
| `FILE.txt`, `.md`, `.rst`, `.py` | the whole file |
| `FILE.jsonl`, `.jsonl.zst`, `.jsonl.gz` | the value of `text` of each line |
| `FILE.parquet` | the column `text`, row by row |
| `FOLDER` | every file of these kinds in it, recursively, in the order of their paths; `survey` lists the others |
| `hf:NAME[:CONFIG]:SPLIT` | the column `text` of a data set that `datasets` can stream |
| `hf:NAME[:CONFIG]:SPLIT[:N]` | its first N rows: the brackets are written, as in `hf:NAME:train[:1000]` |
| `python-stdlib` | the source files of Python's standard library |

Everything is read as a stream, in a fixed order, and nothing is guessed: what cannot be read is an error that names the
file and the line. Empty documents are left out.
"""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, NoReturn

from data import quickstart_corpus
from data.errors import DataError
from data.pointers import pointer_problem

HF_PREFIX = "hf:"
TEXT_KEY = "text"
MAX_ZSTD_WINDOW_BYTES = 2**31  # files written with `zstd --long` need more than the decoder's default of 128 MiB
PARQUET_BATCH_ROWS = 256
READ_BYTES = 1 << 18
MAX_LISTED_KEYS = 20
UNFINISHED_FOLDERS = frozenset({"_temporary", "_delta_log", "_spark_metadata"})
"""What Spark keeps beside its output: parts of attempts, which would be read twice, and logs."""
HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from."""

    text: str
    origin: str
    """`FILE`, `FILE:LINE` or `INPUT:ROW`, for messages."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The files of inputs, before they are read."""

    read: list[Path]
    """Files that are read, in this order."""
    left_out: dict[Path, str]
    """Files and folders below an input that are not read, and why."""

    def reasons(self) -> list[str]:
        """How many are left out for each reason, most first."""
        return [f"{count} {reason}" for reason, count in Counter(self.left_out.values()).most_common()]


def read_documents(inputs: Sequence[str]) -> Iterator[Document]:
    """Yield the documents of all inputs, one input after the other; see the top of this file for what an input is.

    Raises:
        DataError: an input does not exist, is of no known kind, is broken, or they hold no text at all.
    """
    is_empty = True
    for source in inputs:
        for document in _read_input(source):
            if not document.text:
                continue
            if not document.text.isascii():
                _check_encodable(document)
            is_empty = False
            yield document
    if is_empty:
        raise DataError(f"{', '.join(inputs)}: contains no text")


def check_input(source: str) -> None:
    """Make sure that an input is there and of a known kind, without reading it; a hub's data set is not looked up.

    Raises:
        DataError: it is not.
    """
    if source.startswith(HF_PREFIX):
        _split_hub_name(source)
    elif is_path(source):
        _find_files(Path(source))


def is_path(source: str) -> bool:
    """Return whether an input is a file or folder, not a hub's data set or one that needs no file."""
    return not source.startswith(HF_PREFIX) and source != quickstart_corpus.NAME


def _read_input(source: str) -> Iterator[Document]:
    if source == quickstart_corpus.NAME:
        yield from (Document(text, f"{source}/{path}") for path, text in quickstart_corpus.read_standard_library())
    elif source.startswith(HF_PREFIX):
        yield from _read_hugging_face(source)
    else:
        for path in _find_files(Path(source)).read:
            if problem := pointer_problem(path):
                raise DataError(f"{path}: {problem}")
            yield from READERS[_suffix(path)](path)


def survey(inputs: Iterable[str]) -> Survey:
    """List the files that `read_documents` reads, and what it leaves out of folders; a hub's data sets have no files.

    Raises:
        DataError: as `check_input`.
    """
    found = [_find_files(Path(source)) for source in inputs if is_path(source)]
    left_out = {path: reason for one in found for path, reason in one.left_out.items()}
    return Survey([path for one in found for path in one.read], left_out)


def _find_files(path: Path) -> Survey:
    """Find the path itself, or the readable files below it in a fixed order."""
    kinds = " ".join(READERS)
    if path.is_dir():
        found = _look_into(path)
        if not found.read:
            left_out = f"; left out: {', '.join(found.reasons())}" if found.left_out else ""
            raise DataError(f"{path}: this folder has no file of a known kind; known are {kinds}{left_out}")
        return found
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; an input is one of these, {HF_PREFIX}NAME[:CONFIG]:SPLIT or "
            f"{quickstart_corpus.NAME}"
        )
    if _suffix(path) not in READERS:
        raise DataError(f"{path}: this kind of file is not known; choose one of {kinds}")
    return Survey([path], {})


def _look_into(folder: Path) -> Survey:
    """Walk through a folder. Links to files are followed; those to folders may lead anywhere, even back here."""
    found = Survey([], {})

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in sorted(folders):
            if reason := _folder_problem(Path(parent, name)):
                found.left_out[Path(parent, name)] = reason
                folders.remove(name)
        for name in files:
            if reason := _file_problem(Path(parent, name)):
                found.left_out[Path(parent, name)] = reason
            else:
                found.read.append(Path(parent, name))
    return Survey(sorted(found.read), dict(sorted(found.left_out.items())))


def _folder_problem(path: Path) -> str | None:
    """Why a folder is left out."""
    if path.name.startswith("."):
        return HIDDEN
    if path.name in UNFINISHED_FOLDERS:
        return "unfinished output or log of Spark"
    return "linked folder (name it as an input)" if path.is_symlink() else None


def _file_problem(path: Path) -> str | None:
    """Why a file is left out; raises DataError if that would be a mistake."""
    if path.name.startswith("."):
        return HIDDEN
    if (suffix := _suffix(path)) not in READERS:
        return f"of unknown kind {suffix}" if suffix else "without an ending"
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: is a link to nothing; fetch or restore what it leads to, or remove it")
    return None if path.is_file() else "neither a file nor a folder"


def _suffix(path: Path) -> str:
    """Return `.jsonl.zst` for `a.b.jsonl.zst`, `.txt` for `a.b.txt`."""
    compressed = path.suffix in (".zst", ".gz")
    return "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]).lower()


def _check_encodable(document: Document) -> None:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        lone = ascii(document.text[error.start])
        raise DataError(
            f"{document.origin}: contains half of a surrogate pair ({lone}), which is not text; repair it"
        ) from error


def _read_text(path: Path) -> Iterator[Document]:
    try:
        yield Document(path.read_bytes().decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from _parse_lines(file, path)


def _read_jsonl_gz(path: Path) -> Iterator[Document]:
    _check_has_bytes(path)
    with gzip.open(path, "rb") as file:
        yield from _parse_lines(file, path)


def _check_has_bytes(path: Path) -> None:
    """A compressed file of nothing still has a header; decompressors take one without as the end of another."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: has 0 bytes, which no compressed file has; fetch it again, or remove it")


def _read_jsonl_zst(path: Path) -> Iterator[Document]:
    _check_has_bytes(path)
    with path.open("rb") as file:
        yield from _parse_lines(_split_lines(_decompress_zstd(file)), path)


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
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _parse_lines(lines: Iterable[bytes], path: Path) -> Iterator[Document]:
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
        yield Document(_text_of(record, origin), origin)


def _text_of(record: Any, origin: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f'{origin}: a line must be an object with the key "{TEXT_KEY}", not {type(record).__name__}')
    if TEXT_KEY not in record:
        raise DataError(f'{origin}: has no key "{TEXT_KEY}"; its keys are {_listed(record)}')
    text = record[TEXT_KEY]
    if not isinstance(text, str):
        raise DataError(f'{origin}: "{TEXT_KEY}" is {type(text).__name__}; must be text')
    return text


def _listed(names: Iterable[str]) -> str:
    """Some names, for a message: a stranger's file may have any number of them."""
    known = sorted(names)
    more = f" and {len(known) - MAX_LISTED_KEYS} others" if len(known) > MAX_LISTED_KEYS else ""
    return f"{known[:MAX_LISTED_KEYS]}{more}"


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file, or is truncated ({error})") from error
    with file:
        columns = file.schema_arrow.names
        if TEXT_KEY not in columns:
            raise DataError(f'{path}: has no column "{TEXT_KEY}"; its columns are {_listed(columns)}')
        batches = file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[TEXT_KEY])
        row = 0
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}:{row + 1}: the file is damaged in this row or after it ({error})") from error
            if batch is None:
                return
            for value in batch.column(0):
                row += 1
                origin = f"{path}:{row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{origin}: byte {error.start} of the text is not UTF-8; repair the row") from error
                yield Document(_text_of({TEXT_KEY: text}, origin), origin)


def _read_hugging_face(source: str) -> Iterator[Document]:
    """Stream `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`; NAME may be a folder of data files."""
    (name, *config, split), num_rows = _split_hub_name(source)
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
        yield Document(_text_of(record, origin), origin)


def _split_hub_name(source: str) -> tuple[list[str], int | None]:
    """The name, the configuration if there is one, and the split; and how many rows are wanted, None for all.

    `datasets` cannot stream a part of a split, so the number in brackets is not passed on to it.
    """
    name, bracket, number = source.removeprefix(HF_PREFIX).partition("[:")
    parts = name.split(":")
    if len(parts) not in (2, 3) or not all(parts) or (bracket and not re.fullmatch(r"[1-9]\d*\]", number)):
        raise DataError(
            f"{source}: write a data set as {HF_PREFIX}NAME:SPLIT or {HF_PREFIX}NAME:CONFIG:SPLIT; SPLIT[:1000] is its "
            "first 1000 rows"
        )
    return parts, int(number[:-1]) if bracket else None


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}
"""What reads a file, by the end of its name."""
