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
from typing import IO, Any

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

    files: dict[str, list[Path]]
    """Of each input that is a file or a folder, in the order in which they are read."""
    left_out: dict[Path, str]
    """Files and folders below an input that are not read, and why."""

    @property
    def read(self) -> list[Path]:
        """The files of all inputs."""
        return [path for files in self.files.values() for path in files]

    def reasons(self) -> list[str]:
        """How many are left out for each reason, most first."""
        return [f"{count} {reason}" for reason, count in Counter(self.left_out.values()).most_common()]


def read_documents(inputs: Sequence[str], found: Survey | None = None) -> Iterator[Document]:
    """Yield the documents of all inputs, one input after the other; see the top of this file for what an input is.

    Args:
        inputs: names.
        found: their `survey`, so that folders are not listed again.

    Raises:
        DataError: an input does not exist, is of no known kind, is broken, or they hold no text at all.
    """
    found = found or survey(inputs)
    is_empty = True
    for source in inputs:
        for document in _read_input(source, found):
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

    A folder is searched as far as its first file of a known kind: every rank asks, and there may be many files.

    Raises:
        DataError: it is not.
    """
    if source.startswith(HF_PREFIX):
        _split_hub_name(source)
    elif is_path(source):
        path = _path_of(source)
        if not (path.is_dir() and any(reason is None for _, reason in _entries(path))):
            _find_files(path)


def is_path(source: str) -> bool:
    """Return whether an input is a file or folder, not a hub's data set or one that needs no file."""
    return not source.startswith(HF_PREFIX) and source != quickstart_corpus.NAME


def _path_of(source: str) -> Path:
    if not source.strip():  # to `Path` it is the current folder
        raise DataError("an input is blank; name a file or a folder, . for the current one")
    return Path(source)


def _read_input(source: str, found: Survey) -> Iterator[Document]:
    if source == quickstart_corpus.NAME:
        yield from (Document(text, f"{source}/{path}") for path, text in quickstart_corpus.read_standard_library())
    elif source.startswith(HF_PREFIX):
        yield from _read_hugging_face(source)
    else:
        for path in found.files[source]:
            if problem := pointer_problem(path):
                raise DataError(f"{path}: {problem}")
            yield from READERS[_suffix(path)](path)


def survey(inputs: Iterable[str]) -> Survey:
    """List the files that `read_documents` reads, and what it leaves out of folders; a hub's data sets have no files.

    Raises:
        DataError: as `check_input`.
    """
    found = Survey({}, {})
    for source in inputs:
        if source.startswith(HF_PREFIX):
            _split_hub_name(source)
        elif is_path(source):
            found.files[source], left_out = _find_files(_path_of(source))
            found.left_out.update(left_out)
    return found


def _find_files(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the path itself, or the readable files below it in a fixed order; and what is left out of it, and why."""
    kinds = " ".join(READERS)
    if path.is_dir():
        found = list(_entries(path))
        left_out = dict(sorted((entry, reason) for entry, reason in found if reason))
        files = sorted(entry for entry, reason in found if not reason)
        if not files:
            more = f"; left out: {', '.join(Survey({}, left_out).reasons())}" if left_out else ""
            raise DataError(f"{path}: this folder has no file of a known kind; known are {kinds}{more}")
        return files, left_out
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; an input is one of these, {HF_PREFIX}NAME[:CONFIG]:SPLIT or "
            f"{quickstart_corpus.NAME}"
        )
    if _suffix(path) not in READERS:
        raise DataError(f"{path}: this kind of file is not known; choose one of {kinds}")
    if not path.is_file():  # opening a pipe waits for whoever writes to it, and text is read twice
        raise DataError(f"{path}: is neither a file nor a folder; save the text in a file first")
    return [path], {}


def _entries(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Walk through a folder: its files, each with the reason if it is left out, and the folders that are left out.

    Links to files are followed; those to folders may lead anywhere, even back here. A folder's list says what each
    entry is, so that nothing but links is looked up one by one.
    """
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as listing:
                entries = list(listing)
            for entry in entries:
                if not _is_folder(entry):
                    yield Path(entry.path), _file_problem(entry)
                elif reason := _folder_problem(entry):
                    yield Path(entry.path), reason
                else:
                    waiting.append(Path(entry.path))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _folder_problem(entry: os.DirEntry[str]) -> str | None:
    """Why a folder is left out."""
    if entry.name.startswith("."):
        return HIDDEN
    if entry.name in UNFINISHED_FOLDERS:
        return "unfinished output or log of Spark"
    return "linked folder (name it as an input)" if entry.is_symlink() else None


def _file_problem(entry: os.DirEntry[str]) -> str | None:
    """Why a file is left out; raises DataError if that would be a mistake."""
    if entry.name.startswith("."):
        return HIDDEN
    if (suffix := _suffix(Path(entry.name))) not in READERS:
        return f"of unknown kind {suffix}" if suffix else "without an ending"
    if entry.is_file():
        return None
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise DataError(f"{entry.path}: is a link to nothing; fetch or restore what it leads to, or remove it")
    return "neither a file nor a folder"


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
