"""Fault campaigns on checkpoints: a cut of power, bits that flip, copies that were not finished.

The damage is done to real checkpoints, at random but seeded places, many times. Each time the newest sound checkpoint
must be found and what is damaged be named; some of the times, real ranks train on from there, and the end is compared,
bit for bit, with a run that nothing happened to. The short version of a campaign is in the default set.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import NUM_RANKS, NUM_STEPS, Job, assert_equal_runs, job_tree, uninterrupted
from typer.testing import CliRunner
from variants import manifest

from launcher.checkpoint.folders import MANIFEST, complete_checkpoints, folder_of
from launcher.checkpoint.manifest import manifest_digest
from launcher.checkpoint.reader import CheckpointReader, newest_sound_checkpoint
from launcher.checkpoint.tensor_file import DIGESTS, TensorFile
from launcher.checkpoint.writer import CheckpointWriter
from launcher.cli import app
from launcher.engine.contract import Shard
from launcher.errors import CheckpointError
from launcher.process.ranks import Ranks

Record = Callable[[str, object], None]
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
DAMAGED = "manifest.damaged.json"


@pytest.fixture(scope="session")
def reference(shards: Path) -> Path:
    return uninterrupted(shards)


def stand_at(reference: Path, run: Path, step: int, places: random.Random) -> Path:
    """A run that was stopped after that many steps, its log in the middle of a row; returns its checkpoints."""
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    for number in range(max(1, step - 2), step + 1):
        shutil.copytree(folder_of(reference / "checkpoints", number), folder_of(checkpoints, number))
    shutil.copy(reference / "config.yaml", run)
    log = (reference / "metrics.jsonl").read_bytes()
    begins = log.index(b'{"step": %d,' % (step + 1)) if step < NUM_STEPS else len(log)
    (run / "metrics.jsonl").write_bytes(log[: places.randint(begins, len(log))])
    return checkpoints


def newest_sound(checkpoints: Path) -> tuple[str | None, str]:
    """Name of the checkpoint that a run would go on from, and what it would tell."""
    said: list[str] = []
    reader = newest_sound_checkpoint(checkpoints, ALONE, said.append)
    return reader.folder.name if reader else None, "\n".join(said)


def train_on(run: Path, shards: Path, reference: Path) -> str:
    """Let real ranks finish the run, and compare it; returns what they print."""
    job = Job(job_tree(shards, run))
    assert job.wait() == [0, 0], job.output
    assert_equal_runs(run, reference)
    return job.output


def truncate(path: Path, places: random.Random) -> None:
    """Cut a file at a random offset."""
    os.truncate(path, places.randrange(path.stat().st_size))


def cut_power(reference: Path, checkpoints: Path, step: int, places: random.Random) -> str:
    """Leave what a cut of power may leave of a checkpoint in the making; returns which case it is."""
    case = places.choice(["files missing", "files cut", "manifest cut", "store that cannot rename"])
    folder = folder_of(checkpoints, step)
    if case != "store that cannot rename":
        folder = folder.with_name(folder.name + ".tmp")
    shutil.copytree(folder_of(reference / "checkpoints", step), folder)
    if case == "manifest cut":  # the flush of the manifest was the last that did not return
        truncate(folder / MANIFEST, places)
        return case
    (folder / MANIFEST).unlink()
    for path in sorted(folder.iterdir()):
        if case == "files missing" and places.random() < 0.5:
            path.unlink()
        elif places.random() < 0.7:
            truncate(path, places)
    return case


@pytest.mark.parametrize(
    ("num_cuts", "num_trained"), [(20, 1), pytest.param(100, 6, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_cut_of_power_loses_nothing(
    reference: Path, shards: Path, tmp_path: Path, num_cuts: int, num_trained: int, record_testsuite_property: Record
) -> None:
    places, counts = random.Random(num_cuts), Counter[str]()
    for number in range(num_cuts):
        step = places.randrange(1, NUM_STEPS)
        checkpoints = stand_at(reference, tmp_path / str(number), step, places)
        counts[cut_power(reference, checkpoints, step + 1, places)] += 1
        assert newest_sound(checkpoints) == (f"step-{step:08d}", "")  # nothing to tell: it had not been there yet
        if number < num_trained:
            train_on(tmp_path / str(number), shards, reference)
            assert not list(checkpoints.glob("*.tmp"))
    record_testsuite_property("power cuts", dict(counts))


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("sync", path.name))
        sync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    tensors = {kind: torch.ones(6) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    writer = CheckpointWriter(folder_of(tmp_path, 7))
    writer.begin()
    shard = Shard(name="a", shape=(2, 3), start=0, tensors=tensors, step=torch.tensor(7.0), primary=True)
    files = writer.write_rank(0, [shard], {"cpu": torch.get_rng_state()})
    (tmp_path / "given.json").write_text("{}")
    writer.finish(files, "a: 1\n", tmp_path / "given.json", manifest(7))
    assert events == [
        ("sync", "rank-00000.safetensors"),
        ("sync", "tokenizer.json"),
        ("sync", "config.yaml"),
        ("sync", MANIFEST),
        ("sync", "step-00000007.tmp"),
        ("rename", "step-00000007"),
        ("sync", tmp_path.name),
    ]


def a_place(folder: Path, places: random.Random) -> tuple[Path, int, str, str]:
    """A random place in a checkpoint: file, offset, which part of it that is, and, inside a tensor, its name."""
    part = places.choice(["manifest", "config", "header's length", "header", "data", "data", "data", "digests"])
    if part in ("manifest", "config"):
        path = folder / (MANIFEST if part == "manifest" else "config.yaml")
        return path, places.randrange(path.stat().st_size), part, ""
    path = folder / f"rank-{places.randrange(NUM_RANKS):05d}.safetensors"
    entries = TensorFile(path).entries
    if part == "header's length":
        return path, places.randrange(8), part, ""
    if part == "header":
        return path, places.randrange(8, min(entry.start for entry in entries.values())), part, ""
    name = DIGESTS if part == "digests" else places.choice([name for name in entries if name != DIGESTS])
    return path, places.randrange(entries[name].start, entries[name].end), part, name if part == "data" else ""


def flip(path: Path, offset: int, bit: int) -> None:
    """Flip one bit of a file, or flip it back."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(offset)
        file.write(bytes([byte]))


@pytest.mark.parametrize(
    ("num_flips", "num_trained"), [(60, 1), pytest.param(600, 6, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_flipped_bit_costs_one_checkpoint_and_is_named(
    reference: Path, shards: Path, tmp_path: Path, num_flips: int, num_trained: int, record_testsuite_property: Record
) -> None:
    places, counts = random.Random(num_flips), Counter[str]()
    newest = folder_of(stand_at(reference, tmp_path / "run", 10, places), 10)
    for number in range(num_flips):
        path, offset, part, tensor = a_place(newest, places)
        bit = places.randrange(8)
        flip(path, offset, bit)
        counts[part] += 1
        verified = CliRunner().invoke(app, ["verify", str(newest)])
        assert verified.exit_code == 1, (path, offset, bit)
        assert path.name in verified.output, (path, offset, bit, verified.output)
        assert tensor in verified.output, (path, offset, bit, verified.output)
        if number < num_trained:
            run = shutil.copytree(tmp_path / "run", tmp_path / str(number))
            output = train_on(run, shards, reference)
            assert f"{path.name}" in output
            assert "step-00000010 is set aside" in output
            assert "Resuming tiny after step 9" in output
        found, said = newest_sound(newest.parent)
        assert found == "step-00000009", (path, offset, bit)
        assert path.name in said
        assert tensor in said
        assert "step-00000010 is set aside" in said
        (newest / DAMAGED).rename(newest / MANIFEST)  # as it was
        flip(path, offset, bit)
    assert newest_sound(newest.parent) == ("step-00000010", "")
    record_testsuite_property("flipped bits", dict(counts))


def copy_half(source: Path, target: Path, places: random.Random) -> tuple[str, set[str]]:
    """Copy a checkpoint as a copy that was broken off does; returns how it was left, and files that are not whole."""
    names = sorted(path.name for path in source.iterdir())
    places.shuffle(names)
    num_copied = places.randrange(len(names))
    target.mkdir()
    for name in names[: num_copied + 1]:
        shutil.copy(source / name, target / name)
    truncate(target / names[num_copied], places)
    if not (target / MANIFEST).exists():
        return "without manifest", set()
    return "with manifest", set(names[num_copied:])


@pytest.mark.parametrize(
    ("num_copies", "num_trained"), [(20, 1), pytest.param(100, 6, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_checkpoint_that_is_half_copied_is_not_taken(
    reference: Path, shards: Path, tmp_path: Path, num_copies: int, num_trained: int, record_testsuite_property: Record
) -> None:
    places, counts = random.Random(num_copies), Counter[str]()
    for number in range(num_copies):
        step = places.randrange(1, NUM_STEPS)
        run = tmp_path / str(number)
        checkpoints = stand_at(reference, run, step, places)
        source, copy = folder_of(reference / "checkpoints", step + 1), folder_of(checkpoints, step + 1)
        state, broken = copy_half(source, copy, places)
        counts[state] += 1
        if number < num_trained:
            output = train_on(run, shards, reference)
            assert f"Resuming tiny after step {step}," in output
            continue
        found, said = newest_sound(checkpoints)
        assert found == f"step-{step:08d}"
        assert bool(said) == bool(broken)
        assert not broken or any(name in said for name in broken)
    record_testsuite_property("half copies", dict(counts))


def test_where_nothing_is_sound_a_run_does_not_begin_anew_by_itself(reference: Path, tmp_path: Path) -> None:
    places = random.Random(0)
    checkpoints = stand_at(reference, tmp_path / "run", 5, places)
    for folder in complete_checkpoints(checkpoints):
        flip(folder / "config.yaml", 0, 0)
    for _ in range(2):  # a scheduler may start it again and again
        with pytest.raises(CheckpointError, match="no checkpoint is sound") as raised:
            newest_sound_checkpoint(checkpoints, ALONE, lambda line: None)
        assert all(f"step-{step:08d}" in str(raised.value) for step in (3, 4, 5))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_an_older_manifest_that_is_damaged_does_not_hinder_saving(
    reference: Path, shards: Path, tmp_path: Path, damage: str
) -> None:
    places, run = random.Random(0), tmp_path / "run"
    manifest = folder_of(stand_at(reference, run, 9, places), 8) / MANIFEST
    if damage == "cut":
        truncate(manifest, places)
    else:
        flip(manifest, 5, 7)
    job = Job(job_tree(shards, run, checkpoint={"keep_last": 2}))
    assert job.wait(60) == [0, 0], job.output
    assert_equal_runs(run, reference)
    # What cannot be read may be a milestone; it is for people to remove.
    assert [f.name for f in complete_checkpoints(run / "checkpoints")] == [
        f"step-{step:08d}" for step in (8, 10, 11, 12)
    ]
    with pytest.raises(CheckpointError, match="damaged"):
        CheckpointReader(manifest.parent)


def test_a_checkpoint_of_a_later_version_is_neither_taken_nor_set_aside(reference: Path, tmp_path: Path) -> None:
    newest = folder_of(stand_at(reference, tmp_path / "run", 5, random.Random(0)), 5)
    manifest = json.loads((newest / MANIFEST).read_text()) | {"format_version": 99}
    (newest / MANIFEST).write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    with pytest.raises(CheckpointError, match="has format_version 99"):
        newest_sound(newest.parent)
    assert (newest / MANIFEST).exists()


def test_what_cannot_be_removed_does_not_hinder_saving(reference: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = stand_at(reference, run, 9, random.Random(0))
    (checkpoints / "step-00000007.tmp").touch()  # removing begins with this name for the folder
    job = Job(job_tree(shards, run, checkpoint={"keep_last": 2}))
    assert job.wait(60) == [0, 0], job.output
    assert "WARNING: old checkpoints could not be removed" in job.output
    assert_equal_runs(run, reference)


def test_a_run_that_was_killed_behind_its_last_checkpoint_completes(
    reference: Path, shards: Path, tmp_path: Path
) -> None:
    stand_at(reference, tmp_path / "run", NUM_STEPS, random.Random(0))
    train_on(tmp_path / "run", shards, reference)
    assert (tmp_path / "run" / "summary.json").exists()
