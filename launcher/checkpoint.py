"""Checkpoints: complete or not there at all, and the same format for every engine.

    checkpoints/step-00000200/rank-00000.safetensors   what rank 0 holds: flat fp32 ranges of weights and moments
                              config.yaml              the resolved configuration
                              manifest.json            counters, and every file with its size; written last

A tensor is stored as the contiguous ranges that ranks hold of it, flattened: `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`, with `step/NAME` for the updates behind the moments. The header of each file says which range of
which shape it has, so that any number of ranks of any engine can read just what it needs.

A checkpoint is written to a folder `step-00000200.tmp`, flushed, and renamed. Nothing here is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from launcher.engine import Engine
from launcher.runtime import Ranks

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER_KINDS = ("exp_avg", "exp_avg_sq")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; says which file, what is wrong and what to do."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All folders with a manifest, oldest first."""
    folders = checkpoints.glob("step-*") if checkpoints.is_dir() else []
    return sorted(f for f in folders if re.fullmatch(r"step-\d{8}", f.name) and (f / MANIFEST).is_file())


# Writing


def save_checkpoint(
    checkpoints: Path, engine: Engine, ranks: Ranks, *, counters: dict[str, Any], config_text: str, milestone: bool
) -> Path:
    """Write the state of all ranks; a collective.

    Args:
        checkpoints: the run's folder of checkpoints.
        engine: whose state is written.
        ranks: this rank among all.
        counters: what else is needed to go on; ``step`` among it.
        config_text: the resolved configuration, as YAML.
        milestone: whether the checkpoint is kept for good.

    Raises:
        CheckpointError: on every rank, if any rank could not write. Earlier checkpoints are untouched.
    """
    final = folder_of(checkpoints, counters["step"])
    building = final.with_name(final.name + ".tmp")

    def start() -> None:
        if (final / MANIFEST).is_file():
            return
        for leftover in (building, final):
            shutil.rmtree(leftover, ignore_errors=True)
        building.mkdir(parents=True)

    def write_rank() -> None:
        if not (final / MANIFEST).is_file():
            _write_rank_file(building / f"rank-{ranks.rank:05d}.safetensors", engine, ranks)

    def finish() -> None:
        if (final / MANIFEST).is_file():
            return
        _write_text(building / "config.yaml", config_text)
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        manifest = {"format_version": FORMAT_VERSION, "milestone": milestone, **counters, "files": files}
        _write_text(building / MANIFEST, json.dumps(manifest, indent=2))
        _flush(building)
        os.rename(building, final)
        _flush(checkpoints)

    _all_ranks(start if ranks.is_first else None, ranks, building)
    _all_ranks(write_rank, ranks, building)
    _all_ranks(finish if ranks.is_first else None, ranks, building)
    return final


def _all_ranks(action: Any, ranks: Ranks, building: Path) -> None:
    """Run one stage of saving on the ranks that have an action, and raise on all of them if it failed on any."""
    failure = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank}: {error}"
    failures: list[str | None] = [failure]
    if ranks.world_size > 1:
        failures = [None] * ranks.world_size
        dist.all_gather_object(failures, failure)
    if any(failures):
        if ranks.is_first:
            shutil.rmtree(building, ignore_errors=True)
        free = shutil.disk_usage(next(p for p in building.parents if p.exists())).free
        raise CheckpointError(
            f"{building.with_suffix('')}: the checkpoint could not be written: "
            + "; ".join(sorted({text for text in failures if text}))
            + f" ({free / 2**30:.2f} GiB are free there). Earlier checkpoints are complete and untouched."
        )


def _write_rank_file(path: Path, engine: Engine, ranks: Ranks) -> None:
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    ranges = {}
    for shard in engine.shards():
        if not shard.primary or not len(shard.tensors["weight"]):
            continue
        ranges[shard.name] = {"shape": shard.shape, "start": shard.start}
        for kind, tensor in shard.tensors.items():
            tensors[f"{kind}/{shard.name}"] = tensor.clone()
        tensors[f"step/{shard.name}"] = shard.step.clone()
    save_file(tensors, path, metadata={"ranges": json.dumps(ranges)})
    _flush(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and the milestones; 0 keeps all."""
    if not keep_last:
        return
    passing = [f for f in complete_checkpoints(checkpoints) if not json.loads((f / MANIFEST).read_text())["milestone"]]
    for folder in passing[:-keep_last]:
        (folder / MANIFEST).unlink()  # first, so that a folder that is half removed does not count as complete
        shutil.rmtree(folder)


# Reading


class CheckpointReader:
    """A complete checkpoint, opened; reads any range of any tensor.

    Raises:
        CheckpointError: there is none, or a file is missing or has the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for name, size in self.manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                others = [f.name for f in complete_checkpoints(folder.parent) if f != folder]
                raise CheckpointError(
                    f"{path} {state}; the checkpoint is damaged. "
                    + (f"To go on from {others[-1]}, move {folder.name} away." if others else "There is no other one.")
                )
        self._files = {
            name: safe_open(folder / name, framework="pt")
            for name in self.manifest["files"]
            if name.endswith(".safetensors")
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {}
        for file in self._files.values():
            for name, about in json.loads(file.metadata()["ranges"]).items():
                self.shapes[name] = tuple(about["shape"])
                length = file.get_slice(f"weight/{name}").get_shape()[0]
                self._ranges.setdefault(name, []).append((about["start"], about["start"] + length, file))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements ``start`` up to ``start + length`` of a flattened tensor, fp32."""
        pieces = []
        for begin, end, file in sorted(self._ranges[name], key=lambda held: held[0]):
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                pieces.append(file.get_slice(f"{kind}/{name}")[low - begin : high - begin])
        values = torch.cat(pieces) if len(pieces) != 1 else pieces[0]
        if len(values) != length:
            raise CheckpointError(f"{self.folder}: holds only {len(values)} of {length} elements of {kind}/{name}")
        return values

    def read_step(self, name: str) -> Tensor:
        """Updates behind the moments of a parameter, 0-dim."""
        return self._ranges[name][0][2].get_tensor(f"step/{name}")

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """The generators' states of a rank, if the checkpoint was written by that many ranks."""
        file = self._files.get(f"rank-{rank:05d}.safetensors")
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng/")} if file else {}  # noqa: SIM118


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no complete checkpoint (no {MANIFEST} is in it)") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format_version {manifest.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    return manifest


@torch.no_grad()
def load_checkpoint(reader: CheckpointReader, engine: Engine, *, with_optimizer: bool) -> None:
    """Write a checkpoint's weights, and Adam's state if asked for, into this rank's shards.

    Raises:
        CheckpointError: lists every parameter that only one side has, or that has another shape.
    """
    shards = list(engine.shards())
    names = {name for name, _ in engine.model.named_parameters()}
    if problems := list(_mismatches(reader, names, {shard.name: shard.shape for shard in shards})):
        raise CheckpointError(f"{reader.folder} does not fit the model:\n" + "\n".join(problems))
    for shard in shards:
        kinds = ("weight", *OPTIMIZER_KINDS) if with_optimizer else ("weight",)
        for kind in kinds:
            tensor = shard.tensors[kind]
            tensor.copy_(reader.read(kind, shard.name, shard.start, len(tensor)))
        if with_optimizer:
            shard.step.copy_(reader.read_step(shard.name))
    engine.refresh_weights()


def _mismatches(reader: CheckpointReader, names: set[str], shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(names - reader.shapes.keys()):
        yield f"{name}: the model has it, the checkpoint does not"
    for name in sorted(reader.shapes.keys() - names):
        yield f"{name}: the checkpoint has it, the model does not"
    for name, shape in shapes.items():
        if name in reader.shapes and reader.shapes[name] != shape:
            yield f"{name}: {list(reader.shapes[name])} in the checkpoint, {list(shape)} in the model"


def restore_rng(reader: CheckpointReader, ranks: Ranks) -> None:
    """Set this rank's generators to where they were."""
    for key, state in reader.rng_states(ranks.rank).items():
        if key == "rng/cpu":
            torch.set_rng_state(state)
        elif ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state)
