"""Read Tritrain's checkpoints: into any engine, on any number of ranks, and never a damaged one."""

import errno
import json
import reprlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from data.pointers import pointer_problem
from launcher.checkpoint.folders import DAMAGED_MANIFEST, MANIFEST, complete_checkpoints
from launcher.checkpoint.location import reaching
from launcher.checkpoint.manifest import READABLE_VERSIONS, Manifest, manifest_digest, manifest_of
from launcher.checkpoint.ranges import parameters_of
from launcher.checkpoint.source import Source
from launcher.checkpoint.strangers import not_a_model
from launcher.checkpoint.tensor_file import TensorFile, TensorFileError
from launcher.errors import CheckpointError
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import Ranks, everyones

OPENED_AT_ONCE = 16


class DamageError(CheckpointError):
    """A checkpoint is damaged, as opposed to one that cannot be reached at the moment."""


class CheckpointReader(Source):
    """A complete checkpoint, opened: manifest, sizes and headers are checked, the tensors are not (see `damage`).

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: it is not complete, or damaged as far as that is seen from here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        with reaching(folder):
            self.manifest = _read_manifest(folder)
            for name, record in self.manifest.files.items():
                self._check_size(folder / name, record.size)
            names = [name for name in self.manifest.files if name.endswith(".safetensors")]
            with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
                self._files = dict(zip(names, pool.map(self._open, names), strict=True))
        self.has_moments, self.averaged_tokens = self.manifest.has_moments, self.manifest.averaged_tokens
        has_average = self.averaged_tokens is not None
        try:
            self._parameters = parameters_of(self._files, has_moments=self.has_moments, has_average=has_average)
        except TensorFileError as error:
            raise DamageError(f"{folder}/{error}. {self._way_out()}") from error
        self.shapes = {name: parameter.shape for name, parameter in self._parameters.items()}

    def _check_size(self, path: Path, size: int) -> None:
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            state = pointer_problem(path) or state
            raise DamageError(f"{path} {state}; the checkpoint is damaged. {self._way_out()}")

    def _way_out(self) -> str:
        others = [folder.name for folder in complete_checkpoints(self.folder.parent) if folder != self.folder]
        return f"Other checkpoints beside it: {', '.join(others)}." if others else "There is no other one beside it."

    def _open(self, name: str) -> TensorFile:
        try:
            return TensorFile(self.folder / name, self.manifest.files[name].digest)
        except TensorFileError as error:
            raise DamageError(f"{self.folder / name} {error}. {self._way_out()}") from error

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        pieces = []
        for begin, end, file_name in self._parameters[name].ranges:
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                with reaching(self.folder):
                    try:
                        pieces.append(self._files[file_name].read(f"{kind}/{name}", low - begin, high - low))
                    except TensorFileError as error:
                        raise CheckpointError(f"{self.folder / file_name} {error}") from error
        values = pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])
        if len(values) != length:
            raise CheckpointError(f"{self.folder}: holds only {len(values)} of {length} elements of {kind}/{name}")
        return values

    def kinds(self, name: str) -> tuple[str, ...]:
        return self._parameters[name].kinds

    def read_step(self, name: str) -> float:
        return self._parameters[name].step

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """The generators' states of a rank, if the checkpoint was written by that many ranks."""
        file = self._files.get(f"rank-{rank:05d}.safetensors")
        names = [name for name in file.entries if name.startswith("rng/")] if file else []
        return {name.removeprefix("rng/"): file.read(name) for name in names if file}

    def damage(self, rank: int = 0, world_size: int = 1) -> Iterator[str]:
        """Read this rank's share of the bytes of all tensors; yield a sentence for each damaged tensor or file."""
        total, begin = sum(sum(file.sizes.values()) for file in self._files.values()), 0
        for name in sorted(self._files):
            path, mine = self.folder / name, []
            for tensor, num_bytes in self._files[name].sizes.items():
                if (2 * begin + num_bytes) * world_size // max(2 * total, 1) == rank:  # its middle is in the share
                    mine.append(tensor)
                begin += num_bytes
            with reaching(self.folder):
                try:
                    for tensor in self._files[name].damaged(mine):
                        yield f"{path}: {tensor} is damaged: it does not have the digest it was written with"
                except TensorFileError as error:
                    yield f"{path} {error}"
        if rank == 0:
            for name, record in self.manifest.files.items():
                if name not in self._files:
                    with reaching(self.folder):
                        content = (self.folder / name).read_bytes()
                    if xxhash.xxh3_128_hexdigest(content) != record.digest:
                        yield f"{self.folder / name}: is damaged: it does not have the digest it was written with"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if problem := pointer_problem(path):
        raise CheckpointError(f"{path} {problem}")
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        sound = tree["digest"] == manifest_digest(tree)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint (it has no {MANIFEST})") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if problem := not_a_model(folder):
            raise CheckpointError(f"{folder} {problem}") from error
        raise DamageError(f"{path}: damaged, or not the manifest of a checkpoint") from error
    if not sound:
        raise DamageError(f"{path}: damaged: it does not have the digest it was written with")
    if (version := tree.get("format_version")) not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{path}: has format_version {reprlib.repr(version)}; this version reads {readable}")
    try:
        return manifest_of(tree)
    except ValueError as error:
        raise DamageError(f"{path}: {error}") from error


def newest_sound_checkpoint(checkpoints: Path, ranks: Ranks, say: Callable[[str], None]) -> CheckpointReader | None:
    """Open the newest checkpoint that is intact in every byte, going back past damaged ones; a collective.

    Ranks share the reading. Once a sound one is found, the damaged ones after it are set aside: their manifests become
    `manifest.damaged.json`.

    Raises:
        CheckpointError: there are checkpoints, but none is sound. Beginning anew must then be somebody's decision. Or
            one cannot be read for another reason than damage, which is none to go back.
    """
    names: list[str] = []
    with failing_alike(), reaching(checkpoints):
        if ranks.is_first:
            names = [folder.name for folder in complete_checkpoints(checkpoints)]
    names = _from_first(names)
    found: list[str] = []
    damaged: list[Path] = []
    for name in reversed(names):
        reader: CheckpointReader | None = None
        problems: list[str] = []
        obstacles: list[str] = []
        try:
            reader = CheckpointReader(checkpoints / name)
            problems = list(reader.damage(ranks.rank, ranks.world_size))
        except CheckpointError as error:
            damaged_disk = getattr(error.__cause__, "errno", None) == errno.EIO
            (problems if isinstance(error, DamageError) or damaged_disk else obstacles).append(str(error))
        problems = everyones(problems, ranks)
        if obstacles := everyones(obstacles, ranks):
            raise CheckpointError("\n".join(obstacles))
        if reader and not problems:
            for folder in damaged:
                say(f"WARNING: {folder.name} is set aside; the run resumes from {name}.")
                with failing_alike(), reaching(checkpoints):
                    if ranks.is_first:
                        (folder / MANIFEST).rename(folder / DAMAGED_MANIFEST)
            return reader
        say("WARNING: " + "\n".join(problems))
        found += problems
        damaged.append(checkpoints / name)
    if found:
        raise CheckpointError(
            "no checkpoint is sound:\n  " + "\n  ".join(found) + f"\nTo start over, move {checkpoints} away. "
            "To start from another run's checkpoint, set checkpoint.start_from."
        )
    return None


def _from_first(names: list[str]) -> list[str]:
    return list(value_of_first(names)) if dist.is_initialized() else names
