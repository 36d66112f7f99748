"""Find the files of inputs, before they are read; `data.readers` says what an input is."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import quickstart_corpus
from data.errors import DataError
from data.messages import looked_for_in
from data.prepared import INDEX, MANIFEST, is_prepared

HF_PREFIX = "hf:"
MEGATRON = ".idx"
TOKEN_KINDS = (MEGATRON, ".ds")
"""Ends of the names of files of tokens; see `data.token_files`."""
KINDS = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", *TOKEN_KINDS)
"""Ends of the names of files that can be read."""
UNFINISHED_FOLDERS = frozenset({"_temporary", "_delta_log", "_spark_metadata"})
"""What Spark keeps beside its output: parts of attempts, which would be read twice, and logs."""
HIDDEN = "hidden"


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


def check_input(source: str) -> None:
    """Make sure that an input is there and of a known kind, without reading it; a hub's data set is not looked up.

    A folder is searched as far as its first file of a known kind: every rank asks, and there may be many files.

    Raises:
        DataError: it is not.
    """
    if source.startswith(HF_PREFIX):
        split_hub_name(source)
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


def survey(inputs: Iterable[str]) -> Survey:
    """List the files that `read_documents` reads, and what it leaves out of folders; a hub's data sets have no files.

    Raises:
        DataError: as `check_input`.
    """
    found = Survey({}, {})
    for source in inputs:
        if source.startswith(HF_PREFIX):
            split_hub_name(source)
        elif is_path(source):
            found.files[source], left_out = _find_files(_path_of(source))
            found.left_out.update(left_out)
    return found


def beside(path: Path) -> list[Path]:
    """The files that are read with a file of an input, which they lie beside: a token file's tokens, or its index."""
    suffix = suffix_of(path)
    if suffix == MEGATRON:
        return [path.with_suffix(".bin")]
    return [path.with_name(f"{path.name}.{end}") for end in ("index", "metadata")] if suffix in TOKEN_KINDS else []


def with_beside(path: Path) -> list[Path]:
    """A file of an input, and those beside it that are there."""
    return [path, *(each for each in beside(path) if each.is_file())]


def without_held_out(files: Survey, inputs: Sequence[str], held_out: Sequence[str]) -> Survey:
    """The files of inputs and of held-out inputs, those that are held out left out of the folders among the inputs.

    Raises:
        DataError: a held-out file or a split of a hub's is named as an input by itself, or a folder has no other.
    """
    if both := set(inputs) & set(held_out):
        raise DataError(f"{min(both)}: is to be trained on and held out; name it as one of both")
    of_hub = {_split_of(source): source for source in inputs if source.startswith(HF_PREFIX)}
    for source in held_out:
        if source.startswith(HF_PREFIX) and (same := of_hub.get(_split_of(source))):
            raise DataError(
                f"{source}: is held out, and rows of {same}, which is trained on, are of the same split; hold out "
                "another one, or a share by --validation-fraction"
            )
    kept, left_out = dict(files.files), dict(files.left_out)
    apart = {os.path.realpath(path) for source in held_out for path in files.files.get(source, [])}
    for source in inputs if apart else ():
        found = {path: os.path.realpath(path) in apart for path in files.files.get(source, [])}
        if found and all(found.values()):
            raise DataError(f"{source}: all of it is held out, so nothing is left to train on; hold out other text")
        kept[source] = [path for path, is_held_out in found.items() if not is_held_out]
        left_out |= {path: "held out" for path, is_held_out in found.items() if is_held_out}
    return Survey(kept, left_out)


def _find_files(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the path itself, or the readable files below it in a fixed order; and what is left out of it, and why."""
    kinds = " ".join(KINDS)
    if is_prepared(path):
        raise DataError(f"{path}: is prepared data; to prepare its text again, name a split, such as {path / 'train'}")
    if (path / INDEX).is_file() and (path.parent / MANIFEST).is_file():
        return [path / INDEX], {}
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
            f"{path}: no such file or folder{looked_for_in(path)}; an input is one of these, "
            f"{HF_PREFIX}NAME[:CONFIG]:SPLIT or {quickstart_corpus.NAME}"
        )
    if suffix_of(path) not in KINDS:
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
    if (suffix := suffix_of(Path(entry.name))) not in KINDS:
        return f"of unknown kind {suffix}" if suffix else "without an ending"
    if entry.is_file():
        return None
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise DataError(f"{entry.path}: is a link to nothing; fetch or restore what it leads to, or remove it")
    return "neither a file nor a folder"


def suffix_of(path: Path) -> str:
    """Return `.jsonl.zst` for `a.b.jsonl.zst`, `.txt` for `a.b.txt`."""
    compressed = path.suffix in (".zst", ".gz")
    return "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]).lower()


def _split_of(source: str) -> tuple[str, ...]:
    """What an input from a hub names, of which it may be a part; a local folder by its place."""
    (name, *others), _ = split_hub_name(source)
    return os.path.realpath(name) if Path(name).is_dir() else name, *others


def split_hub_name(source: str) -> tuple[list[str], int | None]:
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
