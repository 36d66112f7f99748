"""Pointers of git-lfs and git-annex are recognized wherever a file is opened, and the way to the content is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import ternary_config, write_checkpoint
from models import VARIANTS, build
from tiny import SEQUENCE_LENGTH

from data.mixture import Source
from data.pointers import pointer_problem
from data.readers import READERS, RECORD_READERS, read_documents
from data.sources import open_sources
from data.tokenizer import load_tokenizer
from eval.tasks import rows_of_file
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.file import load_config
from launcher.errors import USER_ERRORS
from launcher.formats.deepspeed_native import DeepSpeedSource
from launcher.formats.hf_source import HuggingFaceSource
from model.hf import config_to_hf

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4294967296\n"
)
ANNEX = b"/annex/objects/SHA256E-s4294967296--4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393.bin\n"


def refused(path: Path, use: Callable[[], object]) -> None:
    """Whoever opens a pointer where `path` is says so, and names it."""
    sound = path.read_bytes() if path.exists() else None
    for pointer, command in ((POINTER, "git lfs pull"), (ANNEX, "git annex get")):
        path.write_bytes(pointer)
        with pytest.raises(USER_ERRORS) as caught:
            use()
        message = str(caught.value)
        assert path.name in message
        assert f"and its content was not fetched; run `{command}`" in message, message
    if sound is not None:
        path.write_bytes(sound)


def test_only_pointers_are_pointers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert pointer_problem(path) is None
    assert pointer_problem(tmp_path) is None
    for content in (b"", b"version https://example.org", b"about " + POINTER, POINTER + b"x" * 1024):
        path.write_bytes(content)
        assert pointer_problem(path) is None


@pytest.mark.parametrize("suffix", [*READERS, *RECORD_READERS])
def test_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    refused(path, lambda: list(read_documents([str(tmp_path)])))
    refused(path, lambda: list(read_documents([str(path)])))


@pytest.mark.parametrize(
    "name", ["manifest.json", "tokenizer.model", "token_bytes.npy", "train/index.json", "train/shard.00000.mds"]
)
def test_prepared_data(name: str, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")

    def use() -> None:
        open_sources([Source(path=str(folder))], None, SEQUENCE_LENGTH, 320)

    refused(folder / name, use)
    use()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_tokenizers(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name, lambda: load_tokenizer(tmp_path / name))
    refused(tmp_path / name, lambda: load_tokenizer(tmp_path))


def test_files_beside_a_tokenizer(shards: Path, tmp_path: Path) -> None:
    shutil.copy(shards / "tokenizer.model", tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json", "added_tokens.json"):
        refused(tmp_path / name, lambda: load_tokenizer(tmp_path))
        (tmp_path / name).unlink()


def test_folders_of_hugging_face(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(VARIANTS["llama"])))
    refused(tmp_path / "config.json", lambda: HuggingFaceSource(tmp_path))
    refused(tmp_path / "model.safetensors.index.json", lambda: HuggingFaceSource(tmp_path))
    refused(tmp_path / "model.safetensors", lambda: HuggingFaceSource(tmp_path))


def test_folders_of_deepspeed(tmp_path: Path) -> None:
    refused(tmp_path / "mp_rank_00_model_states.pt", lambda: DeepSpeedSource(tmp_path))


def test_checkpoints(tmp_path: Path) -> None:
    config = ternary_config(tmp_path / "shards", tmp_path / "run", VARIANTS["llama"])
    folder = write_checkpoint(config, build(config.model), step=8, phase=1)
    for path in list(folder.iterdir()):
        refused(path, lambda: CheckpointReader(folder))
    CheckpointReader(folder)


def test_configurations_and_tasks(tmp_path: Path) -> None:
    refused(tmp_path / "x.yaml", lambda: load_config(tmp_path / "x.yaml"))
    refused(tmp_path / "task.jsonl", lambda: rows_of_file(tmp_path / "task.jsonl"))
