"""Write checkpoints: complete or not at all, and in the same format for every engine.

    checkpoints/step-00000200/rank-00000.safetensors   what rank 0 holds: flat fp32 ranges of weights and moments
                              tokenizer.model          or .json: what made the tokens
                              chat_template.jinja      what wrote the chats, of a run that learns from any
                              config.yaml              the resolved configuration
                              manifest.json            counters, and every file with size and digest; written last

A tensor is stored as the contiguous ranges that ranks hold of it, flattened: `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`, which matrices that Muon updates lack (`"variance": false`), and `average/NAME` if weights are
averaged (`averaged_tokens` in the manifest). The header of each file says which range of which shape it has, and how
many updates are in the moments, so that any number of ranks of any engine can read just what it needs.

Digests form a tree: the manifest has one over itself and one for each file, which for tensors is the root that
`launcher.checkpoint.tensor_file` describes, and that leads to every tensor's. So every byte is covered, and damage
is reported by the tensor's name.

On a file system, a checkpoint is written to a folder `step-00000200.tmp`, flushed, and renamed. A store that cannot
rename gets the manifest last. Nothing here is pickled.
"""

import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from launcher.checkpoint.folders import (
    CHAT_TEMPLATE,
    CONFIG,
    MANIFEST,
    complete_checkpoints,
    unfinished_checkpoints,
)
from launcher.checkpoint.location import create, flush_folder, is_local, remove_folder
from launcher.checkpoint.manifest import FileRecord, Manifest, manifest_digest
from launcher.checkpoint.tensor_file import write_tensors
from launcher.engine.contract import Shard


class CheckpointWriter:
    """A checkpoint that is being written: begun and finished by one process, and filled by every rank.

    Args:
        final: the folder of the complete checkpoint.
        in_place: whether it is an empty folder that the caller has made and will rename; `begin` is not for these.
    """

    def __init__(self, final: Path, *, in_place: bool = False) -> None:
        self.final = final
        self._building = final.with_name(final.name + ".tmp") if is_local(final) and not in_place else final

    def begin(self) -> None:
        """Remove an earlier version of this checkpoint, and others that were never finished."""
        if is_local(self.final):
            for leftover in self.final.parent.glob("step-*.tmp"):
                remove_folder(leftover)
        else:  # the name of a folder in a store is that of its files
            for folder in unfinished_checkpoints(self.final.parent):
                remove_folder(folder)
        remove_checkpoint(self.final)
        if is_local(self.final):
            self._building.mkdir(parents=True)

    def write_rank(self, rank: int, shards: Iterable[Shard], rng: dict[str, Tensor]) -> dict[str, FileRecord]:
        """Write what one rank holds.

        Args:
            rank: of the file's name.
            shards: what is written; those that are not primary, or empty, are left to others.
            rng: states of generators, by name.
        """
        held = [shard for shard in shards if shard.primary and len(shard.tensors["weight"])]
        ranges = {shard.name: range_of(shard.shape, shard.start, float(shard.step), shard.tensors) for shard in held}
        tensors = {f"{kind}/{shard.name}": tensor for shard in held for kind, tensor in shard.tensors.items()}
        tensors |= {f"rng/{name}": state for name, state in rng.items()}
        return self.write_tensors(
            f"rank-{rank:05d}.safetensors",
            [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()],
            ([tensor.detach().cpu()] for tensor in tensors.values()),
            ranges,
        )

    def write_tensors(
        self,
        name: str,
        entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        values: Iterable[Iterable[Tensor]],
        ranges: dict[str, dict[str, Any]],
    ) -> dict[str, FileRecord]:
        """Write one file of tensors (`launcher.checkpoint.tensor_file`); returns its record under its name."""
        path = self._building / name
        with create(path) as file:
            root = write_tensors(file, entries, values, {"ranges": json.dumps(ranges)})
        return {name: FileRecord(size=path.stat().st_size, digest=root)}

    def link(self, path: Path) -> None:
        """Reuse a file of another checkpoint: a hard link, which takes no space and survives the other's removal.

        Where there can be no link, on another file system, it is copied.
        """
        target = self._building / path.name
        if is_local(path) and is_local(target):
            try:
                os.link(path, target)
            except OSError:  # another file system, or one without links
                pass
            else:
                return
        with path.open("rb") as source, create(target) as copy:
            while chunk := source.read(64 * 2**20):
                copy.write(chunk)

    def finish(
        self, files: dict[str, FileRecord], config_text: str, tokenizer: Path | None, manifest: Manifest
    ) -> None:
        """Write tokenizer, configuration and manifest: from here on the checkpoint is complete.

        Args:
            files: of tensors, as the other methods returned them.
            config_text: the resolved configuration, as YAML.
            tokenizer: the file that is copied, with a chat template beside it; None if it is unknown.
            manifest: without files.
        """
        if tokenizer is not None:
            files = files | self._write_small(f"tokenizer{tokenizer.suffix}", tokenizer.read_bytes())
            if (template := tokenizer.with_name(CHAT_TEMPLATE)).is_file():
                files = files | self._write_small(CHAT_TEMPLATE, template.read_bytes())
        files = files | self._write_small(CONFIG, config_text.encode())
        with create(self._building / MANIFEST) as file:
            file.write(manifest.sealed(files).encode())
        flush_folder(self._building)
        if self._building != self.final:
            os.rename(self._building, self.final)
            flush_folder(self.final.parent)

    def _write_small(self, name: str, content: bytes) -> dict[str, FileRecord]:
        with create(self._building / name) as file:
            file.write(content)
        return {name: FileRecord(size=len(content), digest=xxhash.xxh3_128_hexdigest(content))}

    def abandon(self) -> None:
        """Remove what has been written."""
        remove_folder(self._building)


def range_of(shape: tuple[int, ...], start: int, step: float, kinds: Collection[str]) -> dict[str, Any]:
    """The entry of a range in the header of a file of tensors."""
    about = {"shape": shape, "start": start, "step": step}
    return about | ({"variance": False} if "exp_avg" in kinds and "exp_avg_sq" not in kinds else {})


def prune_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and the milestones; 0 keeps all."""
    if not keep_last:
        return
    passing = [folder for folder in complete_checkpoints(checkpoints) if _is_passing(folder)]
    for folder in passing[:-keep_last]:
        remove_checkpoint(folder)


def _is_passing(folder: Path) -> bool:
    """Return whether a checkpoint is certainly not a milestone; one with a damaged manifest may be, and is kept."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return bool(manifest["digest"] == manifest_digest(manifest) and not manifest["milestone"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint if it exists, so that at no moment half of it counts as complete."""
    if is_local(folder) and folder.exists():
        folder = folder.rename(folder.with_name(folder.name + ".tmp"))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)
    remove_folder(folder)
