"""The provenance of files that were made from a checkpoint."""

import dataclasses
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import xxhash

from launcher.checkpoint.location import to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.formats.open import config_of
from launcher.plan.course import Course
from launcher.version import tritrain_version


def provenance(source: Source, course: Course) -> dict[str, Any]:
    """The provenance of a converted run: the source with its digest, the options, the code's version."""
    phase = course.phases[course.config.checkpoint.start_phase]
    return {
        "source": source.location,
        "source_digest": source_digest(source),
        "source_step": source.manifest.step if isinstance(source, CheckpointReader) else None,
        "earlier": source.manifest.provenance if isinstance(source, CheckpointReader) else None,
        "phase": phase.index,
        "transition": dataclasses.asdict(phase.transition),
        "quantization": dataclasses.asdict(phase.quantization) if phase.quantization else None,
        "tritrain_version": tritrain_version(),
        "converted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def source_digest(source: Source) -> str:
    """The XXH3-128 that identifies a source: the manifest's digest, or that of all files' names and contents.

    For the contents of a zip archive stand the names, sizes and CRC-32s of its records.
    """
    if isinstance(source, CheckpointReader):
        return source.manifest.digest
    digest = xxhash.xxh3_128()
    folder = to_location(source.location)
    paths = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(paths, key=str):
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
        with path.open("rb") as file:
            try:  # `.pt` files are archives, which hold a checksum of each record
                infos = zipfile.ZipFile(file).infolist()
            except zipfile.BadZipFile:
                file.seek(0)
            else:
                digest.update(repr([(info.filename, info.CRC, info.file_size) for info in infos]).encode())
                continue
            while chunk := file.read(16 * 2**20):
                digest.update(chunk)
    return digest.hexdigest()


def name_of(source: Source) -> str:
    """The name of a source that others may read: of its run, or of its folder."""
    if isinstance(source, CheckpointReader):
        return config_of(source).run.name
    return Path(source.location).name or Path(source.location).resolve().name


def source_record(source: Source) -> dict[str, Any]:
    """The provenance of files that were made from a source, for others to read: names and digests, no path."""
    manifest = source.manifest if isinstance(source, CheckpointReader) else None
    return {
        "source": name_of(source),
        "step": manifest.step if manifest else None,
        "source_digest": source_digest(source),
        **({"average": manifest.average.get("of")} if manifest and manifest.average else {}),
        "tritrain_version": tritrain_version(),
    }
