"""Saving behind training's back: what is written is the state at the moment of saving, one checkpoint at a time."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_group
from variants import build, manifest, step_once

from launcher.checkpoint.folders import complete_checkpoints, folder_of
from launcher.checkpoint.location import to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.source import KINDS
from launcher.checkpoint.tensor_file import TensorFile
from launcher.checkpoint.writer import CheckpointWriter
from launcher.engine.contract import Engine, load_weights
from launcher.errors import CheckpointError
from launcher.process.ranks import Ranks
from model.init import initial_value

NAME = "model.layers.0.mlp.up_proj.weight"


def make_engine() -> Engine:
    from variants import MODEL

    engine = build(f"fsdp2 x{dist.get_world_size()}", quantized=False)
    load_weights(engine, lambda name, shape, rows: initial_value(name, shape, MODEL, 0, rows))
    return engine


def make_saver(folder: str, *, asynchronous: bool = True, said: list[str] | None = None) -> Saver:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    say = print if said is None else said.append
    return Saver(Path(folder), ranks, tokenizer=None, keep_last=0, asynchronous=asynchronous, say=say)


def save(saver: Saver, engine: Engine, step: int, *, must: bool = True) -> None:
    saver.save(engine, manifest=manifest(step), config_text="", must=must)


class Gate:
    """Holds every writing of a rank's file until it is opened."""

    def __init__(self) -> None:
        self.opened, self.begun, write = threading.Event(), 0, CheckpointWriter.write_rank

        def held(writer: CheckpointWriter, *args: Any) -> Any:
            self.begun += 1
            assert self.opened.wait(30)
            return write(writer, *args)

        CheckpointWriter.write_rank = held  # type: ignore[method-assign]


def train_on_while_writing(folder: str) -> list[int]:
    engine, gate = make_engine(), Gate()
    step_once(engine, 0)
    for kind in ("sync", "async"):
        saver = make_saver(f"{folder}/{kind}", asynchronous=kind == "async")
        if kind == "sync":
            gate.opened.set()
            save(saver, engine, 1)
            gate.opened.clear()
            continue
        save(saver, engine, 1)
        unfinished = len(complete_checkpoints(Path(folder, kind)))
        for step in range(1, 4):  # the state that was saved is overwritten three times
            step_once(engine, step)
        threading.Timer(0.5, gate.opened.set).start()
        save(saver, engine, 4)  # waits for the first
        finished_by_then = len(complete_checkpoints(Path(folder, kind)))
        saver.wait()
    return [unfinished, finished_by_then, len(complete_checkpoints(Path(folder, "async")))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_written_is_the_state_at_the_moment_of_saving(world_size: int, tmp_path: Path) -> None:
    for counts in run_group(world_size, train_on_while_writing, str(tmp_path)):
        assert counts[0] == 0
        assert counts[1] >= 1
        assert counts[2] == 2
    sync, later = (CheckpointReader(folder_of(tmp_path / kind, step)) for kind, step in (("sync", 1), ("async", 4)))
    behind = CheckpointReader(folder_of(tmp_path / "async", 1))
    for name, shape in sync.shapes.items():
        length = torch.Size(shape).numel()
        for kind in KINDS:
            assert torch.equal(sync.read(kind, name, 0, length), behind.read(kind, name, 0, length)), (kind, name)
            assert not torch.equal(sync.read(kind, name, 0, length), later.read(kind, name, 0, length)), (kind, name)
    assert (sync.read_step(NAME), behind.read_step(NAME), later.read_step(NAME)) == (1, 1, 4)


def fail_on_one_rank(folder: str) -> list[str]:
    engine = make_engine()
    said: list[str] = []
    saver = make_saver(folder, said=said)
    write = CheckpointWriter.write_rank

    def fail(writer: CheckpointWriter, *args: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    CheckpointWriter.write_rank = fail  # type: ignore[method-assign]
    save(saver, engine, 1, must=False)
    saver.wait()
    save(saver, engine, 2, must=True)
    try:
        saver.wait()
    except CheckpointError as error:
        said.append(f"raised: {error}")
    CheckpointWriter.write_rank = write  # type: ignore[method-assign]
    save(saver, engine, 3, must=True)
    saver.wait()
    return said


def test_a_failure_is_told_or_raised_on_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    for told, raised in run_group(2, fail_on_one_rank, str(tmp_path)):
        assert told.startswith("WARNING: ")
        assert "step-00000001" in told
        assert raised.startswith("raised: ")
        for text in (told, raised):
            assert "rank 1: " in text
            assert "No space left on device" in text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003"]
    assert list(CheckpointReader(tmp_path / "step-00000003").damage()) == []


def save_once(folder: str) -> None:
    saver = make_saver(folder)
    save(saver, make_engine(), 1)
    saver.wait()


def test_ranks_share_the_bytes_of_one_file_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_group(1, save_once, str(tmp_path))
    reader, folder = CheckpointReader(folder_of(tmp_path, 1)), folder_of(tmp_path, 1)
    [name] = [name for name in reader.manifest.files if name.endswith(".safetensors")]
    file = TensorFile(folder / name, reader.manifest.files[name].digest)
    shares: list[list[str]] = []

    def damaged(self: TensorFile, names: list[str]) -> Iterator[str]:
        shares.append(names)
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "damaged", damaged)
        for rank in range(3):
            assert list(reader.damage(rank, 3)) == []
    assert [tensor for share in shares for tensor in share] == list(file.sizes)
    num_bytes = [sum(file.sizes[tensor] for tensor in share) for share in shares]
    assert max(num_bytes) - min(num_bytes) <= 2 * max(file.sizes.values())
    for tensor in (shares[0][0], shares[2][-1]):
        entry = file.entries[tensor]
        with (folder / name).open("r+b") as damaged_file:
            damaged_file.seek(entry.start)
            byte = damaged_file.read(1)[0]
            damaged_file.seek(entry.start)
            damaged_file.write(bytes([byte ^ 1]))
    found = [list(CheckpointReader(folder).damage(rank, 3)) for rank in range(3)]
    assert [len(problems) for problems in found] == [1, 0, 1]


def test_what_a_killed_save_has_left_in_a_store_is_removed_by_the_next(tmp_path: Path) -> None:
    store = to_location(f"memory://bucket{tmp_path}/checkpoints")
    for step, name in ((7, "rank-00000.safetensors"), (8, "manifest.damaged.json"), (9, "manifest.json")):
        (folder_of(store, step) / name).write_bytes(b"{}")
    (store / "owner.json").write_bytes(b"{}")
    CheckpointWriter(folder_of(store, 12)).begin()
    assert sorted(path.name for path in store.iterdir()) == ["owner.json", "step-00000008", "step-00000009"]
