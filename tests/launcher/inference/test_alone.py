"""A run and a checkpoint need nothing around them: neither the data, nor the folder or directory they were made in."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import tritrain
from exports import make_older
from ranks import run_group
from runs import run
from tiny import tiny_config
from tiny_tasks import write_tasks

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError, ConfigError
from launcher.inference.load import load_model

pytest.importorskip("lm_eval")

RAMP = {"precision": "ternary", "steps": 4, "transition": {"ramp": {"shape": "linear", "steps": 3}}}


def train_where_paths_are_relative(folder: str) -> None:
    os.chdir(folder)
    config = tiny_config(
        Path("data"),
        Path("runs/tiny"),
        model={"max_sequence_length": 160, "hidden_size": 48, "intermediate_size": 64},
        phases=[{"precision": "16-bit", "steps": 4}, RAMP],
        checkpoint={"interval_steps": 2, "keep_last": 0},
    )
    assert run(config) == "complete"


def text_of(model: Path | str) -> str:
    text, _, speed = tritrain("generate", model, "te", "--max-tokens", 8).strip().rpartition("\n")
    assert "tokens/s" in speed
    return text


def used(model: Path | str, mirror: Path, out: Path) -> dict[str, Any]:
    """What all commands that use a model make of it; ``out`` is a folder that is made."""
    out.mkdir()
    (out / "text.txt").write_text("a text that is measured\n" * 10)
    tritrain("eval", model, "--tasks", "piqa", "--task-data", mirror, "--out", out / "scores.json")
    tritrain("export", model, "--to", out / "hf", "--format", "hf-ternary")
    tritrain("export", model, "--to", out / "q8.gguf", "--format", "gguf", "--type", "f16")
    return {
        "library": list(load_model(model).generate("te", max_tokens=8, seed=1)),
        "generate": text_of(model),
        "perplexity": [line for line in tritrain("perplexity", model, out / "text.txt").splitlines() if "bits" in line],
        "scores": [record["scores"] for record in json.loads((out / "scores.json").read_text())["results"]],
        "exports": {
            path.name: path.read_bytes()
            for path in (out / "q8.gguf", *(out / "hf").iterdir())
            if path.name not in ("README.md", "provenance.json")  # which say where it was
        },
    }


@pytest.fixture(scope="module")
def place(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `data/` and `runs/tiny/`, in which that run was started, and `tasks/`."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(shards, folder / "data")
    write_tasks(folder / "tasks")
    run_group(1, train_where_paths_are_relative, str(folder))
    return folder


@pytest.fixture
def copy_of(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the run, somewhere else, seen from a directory in which its paths lead nowhere; and no data."""
    moved = Path(shutil.copytree(place / "runs" / "tiny", tmp_path / "moved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (place / "data").rename(place / "gone")
    yield moved
    (place / "gone").rename(place / "data")


def test_a_run_is_used_without_its_data_after_it_was_moved_and_from_anywhere(
    place: Path, copy_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = used(os.path.relpath(copy_of), place / "tasks", tmp_path / "from-the-run")
    assert (copy_of / "tokenizer.model").read_bytes() == (place / "gone" / "tokenizer.model").read_bytes()

    alone = Path(shutil.move(complete_checkpoints(copy_of / "checkpoints")[-1], tmp_path / "alone"))
    shutil.rmtree(copy_of)
    assert used(alone, place / "tasks", tmp_path / "from-the-checkpoint") == moved

    # As where it was trained, with the tokenizer of the data.
    (place / "gone").rename(place / "data")
    monkeypatch.chdir(place)
    at_home = used(Path("runs/tiny"), place / "tasks", tmp_path / "at-home")
    (place / "data").rename(place / "gone")
    assert at_home == moved


def test_a_checkpoint_on_a_ramp_is_measured_as_on_the_ramp_when_it_is_alone(
    place: Path, copy_of: Path, tmp_path: Path
) -> None:
    steps = {folder.name: folder for folder in complete_checkpoints(copy_of / "checkpoints")}
    alone = Path(shutil.move(steps["step-00000006"], tmp_path / "alone"))
    shutil.rmtree(copy_of)
    precision = CheckpointReader(alone).manifest.precision
    assert precision is not None
    assert precision.weight_strengths == precision.activation_strengths == (1 / 3, 1 / 3)
    mirror = ("--tasks", "piqa", "--task-data", place / "tasks")
    scores = tritrain("eval", alone, *mirror, "--out", tmp_path / "scores.json")
    assert "step 6" in scores
    with pytest.raises(CheckpointError, match=r"on a ramp, at strength 0\.333"):
        load_model(alone)
    with pytest.raises(CheckpointError, match=r"on a ramp, at strength 0\.333"):
        tritrain("export", alone, "--to", tmp_path / "hf", "--format", "hf-ternary")


def test_an_older_checkpoint_takes_the_tokenizer_from_its_run_or_its_data(place: Path, copy_of: Path) -> None:
    newest = complete_checkpoints(copy_of / "checkpoints")[-1]
    make_older(newest)
    text = text_of(copy_of)
    (copy_of / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match="its tokenizer was not found; name it with --tokenizer"):
        tritrain("export", copy_of, "--to", copy_of / "hf", "--format", "hf-ternary")
    (place / "gone").rename(place / "data")
    os.chdir(place)
    assert text_of(copy_of) == text
    (place / "data").rename(place / "gone")


def test_a_damaged_tokenizer_is_found(copy_of: Path) -> None:
    path = complete_checkpoints(copy_of / "checkpoints")[-1] / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is damaged"):
        load_model(copy_of)
